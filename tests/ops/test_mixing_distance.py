"""`mixing_distance` against formulas reimplemented in float64: every distance, pair of mixings and implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.mixing_formulas import (
    DISTANCES,
    ROW_DISTANCES,
    SOFTMAX_PAIRS,
    SSD_PAIRS,
    built,
    compare,
    head_weights,
    make_softmax,
    make_ssd,
    normal,
    other_student,
    softmax_pair,
    some_mask,
    ssd_pair,
)
from xarch_kd.errors import UsageError
from xarch_kd.mixing import SoftmaxMixing, SSDMixing
from xarch_kd.ops import mixing_distance
from xarch_kd.ops.dispatch import choose
from xarch_kd.ops.mixing_distance import unsupported_reasons


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("pair", SOFTMAX_PAIRS)
def test_softmax_pairs(pair: str, distance: Any, impl: str) -> None:
    teacher, student, head_map = softmax_pair(pair, torch.float64)
    compare(teacher, student, head_map, distance, impl, mask=some_mask())


@pytest.mark.parametrize("distance", ROW_DISTANCES)
@pytest.mark.parametrize("pair", SOFTMAX_PAIRS)
def test_softmax_pairs_by_panels(pair: str, distance: Any) -> None:
    teacher, student, head_map = softmax_pair(pair, torch.float64)
    compare(teacher, student, head_map, distance, "panels", mask=some_mask())


@pytest.mark.parametrize("impl", ["reference", "streaming", "panels"])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
@pytest.mark.parametrize("pair", SSD_PAIRS)
def test_state_space_students(pair: str, distance: Any, impl: str) -> None:
    teacher, student, head_map = ssd_pair(pair, torch.float64)
    compare(teacher, student, head_map, distance, impl, mask=some_mask())


OTHER_STUDENTS = ("linear", "linear, normalised", "gated linear", "banded", "selective", "delta")


@pytest.mark.parametrize("impl", ["reference", "streaming", "panels"])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
@pytest.mark.parametrize("name", OTHER_STUDENTS)
def test_students_of_other_families(name: str, distance: Any, impl: str) -> None:
    student = other_student(name, torch.float64)
    teacher = built(SoftmaxMixing, make_softmax(0, 2, 1, 5), torch.float64, True, scale=0.7)
    if (name, impl) == ("delta", "streaming"):
        with pytest.raises(UsageError, match="not made by themselves; impl='panels'"):
            mixing_distance(student, teacher, distance=distance, head_map=head_weights(3, 2), impl=impl)
        assert set(unsupported_reasons(student, teacher)) >= {"streaming", "sketch"}
        return
    compare(teacher, student, head_weights(3, 2), distance, impl, mask=some_mask())


@pytest.mark.parametrize("impl", ["streaming", "panels"])
@pytest.mark.parametrize("name", OTHER_STUDENTS)
def test_teachers_of_other_families(name: str, impl: str) -> None:
    student = built(SSDMixing, make_ssd(10, 4, 2), torch.float64, True)
    compare(other_student(name, torch.float64), student, head_weights(4, 3), "cosine", impl, mask=some_mask())


@pytest.mark.parametrize("impl", ["reference", "streaming", "panels"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_other_reductions(distance: Any, reduction: str, impl: str) -> None:
    teacher, student, head_map = ssd_pair("padded", torch.float64)
    compare(teacher, student, head_map, distance, impl, reduction=reduction, mask=some_mask())


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("distance", ["kl", "cross_entropy"])
def test_other_reductions_of_logarithms(distance: Any, reduction: str, impl: str) -> None:
    teacher, student, head_map = softmax_pair("padded", torch.float64)
    compare(teacher, student, head_map, distance, impl, reduction=reduction, mask=some_mask())


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("distance", ["cross_entropy", *ROW_DISTANCES])
def test_sinks_on_both_sides_and_an_unnormalized_map(distance: Any, impl: str) -> None:
    teacher = built(SoftmaxMixing, make_softmax(0, 3, 1, 5, sinks=True), torch.float64, True, scale=0.7)
    student = built(SoftmaxMixing, make_softmax(9, 2, 1, 4, sinks=True), torch.float64, True, scale=0.6, softcap=2.0)
    compare(teacher, student, 3 * head_weights(2, 3), distance, impl)


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_a_teacher_that_is_not_causal_and_a_student_that_is(distance: Any, impl: str) -> None:
    teacher = built(SoftmaxMixing, make_softmax(0, 4, 2, 5), torch.float64, True, scale=0.7, causal=False)
    student = built(SSDMixing, make_ssd(10, 4, 2), torch.float64, True)
    compare(teacher, student, None, distance, impl)


# float32: products and sums of at most 11 numbers of size 1 to 10, gradients of a few such steps, relative to the
# largest gradient: 2^-23 times a few tens.
@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("pair", ["plain", "padded", "softcap"])
def test_float32_softmax_pairs(pair: str, distance: Any, impl: str) -> None:
    teacher, student, head_map = softmax_pair(pair, torch.float32)
    compare(teacher, student, head_map, distance, impl, values=3e-6, gradients=5e-6)


@pytest.mark.parametrize("impl", ["reference", "streaming", "panels"])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
@pytest.mark.parametrize("pair", ["two groups", "padded", "strong decay"])
def test_float32_state_space_students(pair: str, distance: Any, impl: str) -> None:
    teacher, student, head_map = ssd_pair(pair, torch.float32)
    compare(teacher, student, head_map, distance, impl, values=3e-6, gradients=5e-6)


# bfloat16 factors are widened before anything is computed: only the gradients are rounded, to 2^-9 of their size.
@pytest.mark.parametrize("impl", ["reference", "streaming", "panels"])
def test_bfloat16_factors_round_only_the_gradients(impl: str) -> None:
    teacher, student, head_map = ssd_pair("two groups", torch.bfloat16)
    compare(teacher, student, head_map, "cosine", impl, values=3e-6, gradients=2**-8)
    if impl != "panels":
        teacher, student, head_map = softmax_pair("grouped heads", torch.bfloat16)
        compare(teacher, student, head_map, "kl", impl, values=3e-6, gradients=2**-8)


def test_near_the_teacher_the_gradient_keeps_its_digits() -> None:
    """The student's queries differ from the teacher's by 1e-3: KL is near 1e-6, and its gradient a small difference."""
    factors = make_softmax(0, 4, 2, 8)
    near = {**factors, "query": factors["query"] + 1e-3 * normal(5, *factors["query"].shape)}
    teacher = built(SoftmaxMixing, factors, torch.float32, False, scale=0.4)
    student = built(SoftmaxMixing, near, torch.float32, True, scale=0.4)
    # Entries of at most 1 whose differences are near 1e-3 have 2^-24 / 1e-3 = 6e-5 left.
    compare(teacher, student, None, "kl", "streaming", values=1.0, gradients=1e-3)
    for distance in ("frobenius", "relative_frobenius"):
        again = student.map_factors(lambda factor: factor.detach().clone().requires_grad_())
        compare(teacher, again, None, distance, "streaming", values=1e-3, gradients=1e-3)
    same = mixing_distance(teacher, teacher, distance="kl", impl="streaming").total
    assert abs(same.item()) < 1e-6


def test_a_decay_that_leaves_little_keeps_its_gradient_in_float32() -> None:
    """Off the diagonal entries are e^-18 of those on it, which do not depend on the decay."""
    factors = make_ssd(10, 4, 2, skip=False)
    factors["log_decay"] = torch.full_like(factors["log_decay"], -18.0)
    teacher = built(SoftmaxMixing, make_softmax(0, 4, 1, 5), torch.float32, False, scale=0.7)
    student = built(SSDMixing, factors, torch.float32, True)
    wide = built(SSDMixing, factors, torch.float64, True)
    found = mixing_distance(student, teacher, distance="frobenius", impl="streaming").total
    expected = mixing_distance(wide, teacher, distance="frobenius", impl="reference").total
    mine = torch.autograd.grad(found, student.factors["log_decay"])[0].double()
    theirs = torch.autograd.grad(expected, wide.factors["log_decay"])[0]
    # Exponents near 18 are rounded to 2^-20, and so are the entries.
    assert (mine - theirs).abs().max().item() < 1e-5 * theirs.abs().max().item()


def test_what_uncounted_tokens_hold_does_not_matter() -> None:
    teacher, student, _ = ssd_pair("padded", torch.float64)
    lost = ~(teacher.valid_mask() & student.valid_mask())
    head_map = head_weights(4, 6)

    def spoil(factor: Tensor) -> Tensor:
        spoiled = factor.detach().clone()
        if spoiled.shape[:2] == lost.shape:
            spoiled[lost] = torch.nan
        return spoiled.requires_grad_()

    for impl in ("reference", "streaming", "panels"):
        expected = mixing_distance(student, teacher, head_map=head_map, impl=impl).total
        spoiled = student.map_factors(spoil)
        found = mixing_distance(spoiled, teacher.map_factors(spoil), head_map=head_map, impl=impl).total
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        found.backward()
        for factor in spoiled.factors.values():
            assert factor.grad is not None and bool(torch.isfinite(factor.grad).all())
            assert factor.grad.dim() == 1 or not bool(factor.grad[~spoiled.valid_mask()].any())


@pytest.mark.parametrize("chunk_size", [1, 3, 100, None])
@pytest.mark.parametrize("impl", ["streaming", "panels"])
def test_the_chunk_size_changes_nothing(impl: str, chunk_size: int | None) -> None:
    teacher, student, head_map = ssd_pair("padded", torch.float64)
    found = mixing_distance(student, teacher, head_map=head_map, impl=impl, chunk_size=chunk_size).total
    expected = mixing_distance(student, teacher, head_map=head_map, impl="reference").total
    names, factors = zip(*student.factors.items(), strict=True)
    pairs = zip(torch.autograd.grad(found, factors), torch.autograd.grad(expected, factors), strict=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for name, (mine, theirs) in zip(names, pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("impl", ["streaming", "panels"])
@pytest.mark.parametrize("name", ["C", "B", "log_decay", "dt", "D"])
def test_only_wanted_gradients_are_made(name: str, impl: str) -> None:
    teacher, student, _ = ssd_pair("two groups", torch.float64)
    head_map, wanted = head_weights(4, 6), student.factors[name]
    expected = mixing_distance(student, teacher, head_map=head_map, impl="reference").total
    alone = student.map_factors(lambda factor: factor if factor is wanted else factor.detach())
    found = mixing_distance(alone, teacher, head_map=head_map, impl=impl).total
    mine, theirs = torch.autograd.grad(found, wanted)[0], torch.autograd.grad(expected, wanted)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)
    with torch.no_grad():
        assert not mixing_distance(student, teacher, head_map=head_map, impl=impl).total.requires_grad


def test_auto_takes_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    teacher, student, head_map = ssd_pair("two groups", torch.float64)
    assert choose("mixing_distance", "auto", unsupported_reasons(student, teacher, head_map=head_map)) == "streaming"
    delta = other_student("delta", torch.float64)
    found = unsupported_reasons(delta, teacher, distance="frobenius", head_map=head_map)
    assert choose("mixing_distance", "auto", found) == "panels"
    assert "sketch" not in found
