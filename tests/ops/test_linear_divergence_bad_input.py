"""`linear_divergence` on invalid input: an error with asked, found and allowed, and never a NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.flat import flat_divergence
from xarch_kd.errors import NonFiniteLoss, UsageError

IMPLEMENTATIONS = ("reference", "streaming")


def arguments(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "student_hidden": torch.randn(2, 5, 4, generator=generator),
        "student_weight": torch.randn(11, 4, generator=generator),
        "teacher_hidden": torch.randn(2, 5, 6, generator=generator),
        "teacher_weight": torch.randn(13, 6, generator=generator),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student_hidden": torch.randn(4)}, ["student_hidden", "[4]", "[batch, time, dim]"]),
        ({"student_weight": torch.randn(11, 5)}, ["student_head.weight", "[11, 5]", "[11, 4]"]),
        ({"teacher_weight": torch.randn(13)}, ["teacher_head", "[vocabulary, dim]"]),
        ({"teacher_hidden": torch.randn(2, 4, 6)}, ["teacher does not fit", "[2, 4, 6]", "[2, 5, 6]"]),
        ({"student_bias": torch.randn(10)}, ["student_head.bias", "[10]", "[11]"]),
        ({"teacher_bias": torch.full((13,), float("-inf"))}, ["teacher_head.bias must be finite", "vocabulary="]),
        ({"student_hidden": torch.ones(2, 5, 4, dtype=torch.long)}, ["student_hidden must be floating point", "int64"]),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ["mask", "[2, 4]", "[2, 5]"]),
        ({"mask": torch.ones(2, 5)}, ["mask must be boolean", "float32", "mask.bool()"]),
        ({"labels": torch.zeros(2, 5)}, ["labels must be integers", "float32"]),
        ({"labels": torch.full((2, 5), 11)}, ["outside the vocabulary", "11", "0 to 10"]),
        ({"labels": torch.full((2, 5), -1)}, ["outside the vocabulary", "-1", "-100"]),
        ({"token_weights": torch.full((2, 5), -1.0)}, ["token_weights", ">= 0"]),
        ({"token_weights": torch.full((2, 5), float("nan"))}, ["token_weights"]),
        ({"temperature": 0.0}, ["temperature must be positive", "0.0", "> 0"]),
        ({"temperature": -1.0}, ["temperature must be positive"]),
        ({"temperature": float("nan")}, ["temperature must be positive"]),
        ({"divergence": {"kind": "jsd", "beta": 2}}, ["beta=2", "0 <= beta <= 1"]),
        ({"divergence_weight": -1.0}, ["divergence_weight", ">= 0"]),
        ({"cross_entropy": 0.5}, ["cross_entropy needs labels"]),
        ({"vocabulary": 12}, ["12", "11 student rows and 13 teacher rows", "1 to 11"]),
        ({"vocabulary": 0}, ["1 to 11"]),
        (
            {"teacher_weight": torch.zeros(11 + 1025, 6)},
            ["more than padding", "11 student rows and 1036 teacher rows", "at most 1024", "vocabulary="],
        ),
        ({"student_softcap": 0.0}, ["student_head.softcap must be positive"]),
        ({"teacher_scale": float("inf")}, ["teacher_head.scale must be finite"]),
        ({"reduction": "average"}, ["average", "none | mean | sum"]),
        ({"chunk_size": 0}, ["chunk_size", ">= 1"]),
        ({"student_weight": torch.empty(11, 4, device="meta")}, ["different devices", "student_head.weight on meta"]),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        flat_divergence(**arguments(**changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_token_that_counts_is_an_error_for_a_mean_and_0_for_a_sum(impl: str) -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(UsageError, match="no token is valid"):
        flat_divergence(**arguments(), mask=nothing, impl=impl)
    for reduction in ("sum", "none"):
        given = arguments(student_bias=torch.zeros(11))
        trained = [given[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")]
        loss = flat_divergence(**given, mask=nothing, impl=impl, reduction=reduction)
        assert torch.count_nonzero(loss.total) == 0
        loss.total.sum().backward()
        for tensor in trained:
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["student_hidden", "teacher_weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_is_named(impl: str, name: str, value: float) -> None:
    given = arguments()
    given[name].view(-1)[1] = value
    with pytest.raises(NonFiniteLoss, match="divergence is not finite"):
        flat_divergence(**given, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_masked_token_may_hold_anything(impl: str) -> None:
    clean, dirty = arguments(), arguments()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    dirty["student_hidden"][1, 3] = float("nan")
    dirty["teacher_hidden"][1, 3] = float("inf")
    for given in (clean, dirty):
        given["student_hidden"].requires_grad_()
        given["total"] = flat_divergence(**given, mask=mask, impl=impl).total
        given["total"].backward()
    assert torch.equal(clean["total"], dirty["total"])
    assert torch.equal(clean["student_hidden"].grad, dirty["student_hidden"].grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_single_token_works(impl: str) -> None:
    given = arguments(student_hidden=torch.randn(1, 4), teacher_hidden=torch.randn(1, 6))
    assert torch.isfinite(flat_divergence(**given, impl=impl).total)


def test_a_second_backward_and_a_double_backward_are_refused() -> None:
    given = arguments()
    given["student_hidden"].requires_grad_()
    total = flat_divergence(**given).total
    total.backward(retain_graph=True)
    with pytest.raises(UsageError, match="already used by an earlier backward"):
        total.backward()
    total = flat_divergence(**given).total
    with pytest.raises(UsageError, match="no second derivative") as caught:
        torch.autograd.grad(total, given["student_hidden"], create_graph=True)
    assert "impl='reference'" in str(caught.value)
    total = flat_divergence(**given, reduction="none").total.sum()
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(total, given["student_hidden"], create_graph=True)


def test_an_input_changed_before_a_recomputing_backward_is_refused() -> None:
    given = arguments()
    weight = given["student_weight"].requires_grad_()
    total = flat_divergence(**given, reduction="none").total.sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("vocabulary", [11, 9])
def test_vocabularies_far_apart_are_compared_where_that_is_asked_for(vocabulary: int) -> None:
    wide = arguments(teacher_weight=torch.randn(2000, 6, generator=torch.Generator().manual_seed(1)))
    narrow = wide | {"teacher_weight": wide["teacher_weight"][:vocabulary]}
    found = flat_divergence(**wide, vocabulary=vocabulary).total
    assert torch.equal(found, flat_divergence(**narrow, vocabulary=vocabulary).total)


def one_hot(tokens: int, apart: int, **changes: Any) -> dict[str, Any]:
    """Return `tokens` tokens of which `apart` have a student that is sure of another entry than its teacher."""
    sure = 40 * torch.eye(5)
    student = torch.zeros(tokens, dtype=torch.long)
    student[:apart] = 1
    return {
        "student_hidden": sure[student].requires_grad_(),
        "student_weight": torch.eye(5),
        "teacher_hidden": sure[torch.zeros(tokens, dtype=torch.long)],
        "teacher_weight": torch.eye(5),
    } | changes


@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_saturation_of_most_tokens_is_warned_of(divergence: str) -> None:
    with pytest.warns(UserWarning, match=f"{divergence} is saturated: 4 of 7 tokens .* Start with forward_kl"):
        flat_divergence(**one_hot(7, 4), divergence=divergence, chunk_size=3)


def test_a_teacher_that_is_met_or_a_divergence_with_a_gradient_is_not_warned_of() -> None:
    """Warnings are errors in this suite."""
    flat_divergence(**one_hot(7, 3), divergence="jsd")
    flat_divergence(**one_hot(7, 4), divergence="forward_kl")
    flat_divergence(**one_hot(7, 4), divergence="reverse_kl")
    flat_divergence(**one_hot(7, 4, student_hidden=40 * torch.eye(5)[[1] * 7]), divergence="jsd")
    near = arguments(teacher_hidden=torch.zeros(2, 5, 4), teacher_weight=torch.zeros(11, 4))
    near["student_hidden"] = torch.zeros(2, 5, 4, requires_grad=True)
    flat_divergence(**near, divergence="jsd")
