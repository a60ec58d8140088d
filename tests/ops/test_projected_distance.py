"""`projected_distance` against formulas reimplemented in float64, and the streamed form against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import FeatureDistanceFormula, projected_distance

IMPLEMENTATIONS = ("reference", "streaming")
SHAPE, STUDENT_WIDTH, TEACHER_WIDTH, EPSILON = (3, 7), 6, 9, 1e-4

# One value per token, from y and t [..., width].
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda y, t: ((y - t) ** 2).sum(-1) / y.shape[-1],
    "squared_error": lambda y, t: ((y - t) ** 2).sum(-1),
    # At the default delta of 1.
    "huber": lambda y, t: torch.where((y - t).abs() > 1, (y - t).abs() - 0.5, (y - t) ** 2 / 2).mean(-1),
    "l2": lambda y, t: ((y - t) ** 2).sum(-1).sqrt(),
    "cosine": lambda y, t: (
        1 - torch.einsum("...d,...d->...", y, t) / ((y.pow(2).sum(-1) + EPSILON) * (t.pow(2).sum(-1) + EPSILON)).sqrt()
    ),
    "normalised_mse": lambda y, t: (y - t).norm(dim=-1) ** 2 / (t.norm(dim=-1) ** 2 + EPSILON),
}


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student, weight, bias = normal(*SHAPE, STUDENT_WIDTH), normal(TEACHER_WIDTH, STUDENT_WIDTH), normal(TEACHER_WIDTH)
    return student.requires_grad_(), normal(*SHAPE, TEACHER_WIDTH), weight.requires_grad_(), bias.requires_grad_()


def some_mask() -> Tensor:
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[0, 3:] = mask[2, 1] = False
    return mask


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("distance", FORMULAS)
def test_values_and_gradients_equal_the_formula(distance: Any, reduction: str, impl: str) -> None:
    mask, upstream = some_mask(), torch.linspace(0.5, 2, 21, dtype=torch.float64).view(SHAPE)
    student, teacher, weight, bias = make()
    value = projected_distance(
        student,
        teacher,
        weight=weight,
        bias=bias,
        distance=distance,
        mask=mask,
        reduction=reduction,
        epsilon=EPSILON,
        impl=impl,
        chunk_size=4,
    ).total
    ((value * upstream).sum() if reduction == "none" else 3 * value).backward()
    s, t, w, b = make()
    rows = FORMULAS[distance](torch.einsum("btd,ed->bte", s, w) + b, t) * mask
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / mask.sum()}[reduction]
    ((expected * upstream).sum() if reduction == "none" else 3 * expected).backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    for mine, theirs in ((student, s), (weight, w), (bias, b)):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_relative_mse_is_a_ratio_of_sums(impl: str) -> None:
    mask = some_mask()
    student, teacher, weight, _ = make()
    value = projected_distance(
        student, teacher, weight=weight, distance="relative_mse", mask=mask, impl=impl, chunk_size=4
    ).total
    value.backward()
    s, t, w, _ = make()
    expected = ((s @ w.T - t)[mask] ** 2).sum() / (t[mask] ** 2).sum()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, s.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_widths_need_no_projector(impl: str) -> None:
    _, teacher, _, _ = make()
    student = (teacher * 0.9).requires_grad_()
    value = projected_distance(student, teacher, distance="relative_mse", impl=impl).total
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(0.01, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, -0.2 * teacher / teacher.square().sum(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("delta", [0.25, 3.0])
def test_huber_turns_at_delta(delta: float, impl: str) -> None:
    student, teacher, weight, _ = make()
    projected_distance(student, teacher, weight=weight, distance="huber", delta=delta, impl=impl).total.backward()
    s, t, w, _ = make()
    r = s @ w.T - t
    assert bool((r.abs() > delta).any()) and bool((r.abs() < delta).any())
    torch.where(r.abs() > delta, delta * (r.abs() - delta / 2), r**2 / 2).mean().backward()
    torch.testing.assert_close(student.grad, s.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_l2_pulls_with_one_strength_until_it_is_there(impl: str) -> None:
    """The gradient of a token has the length 1 however far it is, and is 0 where student and teacher agree."""
    _, teacher, _, _ = make()
    gap = torch.randn(*SHAPE, TEACHER_WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gap *= torch.logspace(-6, 3, 21, dtype=torch.float64).view(*SHAPE, 1)
    gap[0, 0] = 0
    student = (teacher + gap).requires_grad_()
    value = projected_distance(student, teacher, distance="l2", reduction="sum", impl=impl).total
    value.backward()
    assert student.grad is not None
    expected = torch.ones(SHAPE, dtype=torch.float64)
    expected[0, 0] = 0
    torch.testing.assert_close(student.grad.norm(dim=-1), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [*FORMULAS, "relative_mse"])
def test_the_error_is_within_the_budget_of_the_dense_form(distance: Any, dtype: torch.dtype) -> None:
    """Streamed error against float64 <= 4 x the dense form's + one rounding (16 of float32's, for another order)."""

    def run(impl: str, wide: bool) -> list[Tensor]:
        student, teacher, weight, bias = (
            tensor.detach().to(torch.float64 if wide else dtype) for tensor in make(dtype)
        )
        trained = [tensor.requires_grad_() for tensor in (student, weight, bias)]
        value = projected_distance(
            student, teacher, weight=weight, bias=bias, distance=distance, impl=impl, chunk_size=4
        ).total
        value.backward()
        return [value.detach(), *(tensor.grad for tensor in trained if tensor.grad is not None)]

    exact, dense, streamed = run("reference", True), run("reference", False), run("streaming", False)
    single = 16 * torch.finfo(torch.float32).eps
    for index, (true, theirs, mine) in enumerate(zip(exact, dense, streamed, strict=True)):
        band = (single if index == 0 else max(single, torch.finfo(dtype).eps)) * true.abs().max()
        assert (mine.double() - true).abs().max() <= 4 * (theirs.double() - true).abs().max() + band


def test_only_what_trains_gets_a_gradient() -> None:
    student, teacher, weight, bias = make()
    projected_distance(student.detach(), teacher, weight=weight, bias=bias).total.backward()
    assert student.grad is None
    assert weight.grad is not None and bias.grad is not None


def test_autocast_does_not_narrow() -> None:
    student, teacher, weight, _ = make(torch.float32)
    expected = projected_distance(student, teacher, weight=weight).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl in IMPLEMENTATIONS:
            torch.testing.assert_close(
                projected_distance(student, teacher, weight=weight, impl=impl).total, expected, rtol=1e-5, atol=0
            )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_token_that_counts_and_a_teacher_of_zeros(impl: str) -> None:
    student, teacher, weight, _ = make()
    nothing = torch.zeros(SHAPE, dtype=torch.bool)
    with pytest.raises(UsageError, match="no token is valid"):
        projected_distance(student, teacher, weight=weight, mask=nothing, impl=impl)
    total = projected_distance(student, teacher, weight=weight, mask=nothing, reduction="sum", impl=impl).total
    total.backward()
    assert total.item() == 0 and student.grad is not None and torch.count_nonzero(student.grad) == 0
    with pytest.raises(UsageError, match="0 everywhere"):
        projected_distance(student, teacher * 0, weight=weight, distance="relative_mse", impl=impl)
    for distance in ("cosine", "normalised_mse"):
        student, _, weight, _ = make()
        projected_distance(student * 0, teacher * 0, weight=weight, distance=distance, impl=impl).total.backward()
        assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("distance", [*FORMULAS, "relative_mse"])
def test_non_finite_features_are_named_unless_masked(impl: str, distance: Any) -> None:
    student, teacher, weight, _ = make()
    with torch.no_grad():
        student[0, 5] = float("nan")
        teacher[0, 5] = float("inf")
    with pytest.raises(NonFiniteLoss, match=f"'{distance}' is not finite"):
        projected_distance(student, teacher, weight=weight, distance=distance, impl=impl)
    masked = projected_distance(student, teacher, weight=weight, distance=distance, mask=some_mask(), impl=impl).total
    masked.backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distance": "msee"}, ["Did you mean 'mse'"]),
        ({"distance": "relative_mse", "reduction": "sum"}, ["ratio of sums", "squared_error"]),
        ({"weight": None}, ["differ in dim", "student 6, teacher 9", "[teacher dim, student dim]"]),
        ({"weight": torch.randn(6, 9)}, ["weight", "[6, 9]", "[9, 6]"]),
        ({"bias": torch.randn(6)}, ["bias", "[6]", "[9]"]),
        ({"teacher": torch.randn(3, 6, 9)}, ["teacher", "[3, 6, 9]", "[3, 7, 9]"]),
        ({"mask": torch.ones(3, 7)}, ["mask must be boolean"]),
        ({"epsilon": -1.0}, ["epsilon"]),
        ({"delta": 0.0}, ["delta", "above 0"]),
        ({"student": torch.ones(3, 7, 6, dtype=torch.long)}, ["student must be floating point"]),
        ({"chunk_size": -1}, ["chunk_size"]),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    given: dict[str, Any] = {
        "student": torch.randn(3, 7, 6),
        "teacher": torch.randn(3, 7, 9),
        "weight": torch.randn(9, 6),
        **changes,
    }
    with pytest.raises(UsageError) as caught:
        projected_distance(given.pop("student"), given.pop("teacher"), **given)
    for word in words:
        assert word in str(caught.value)


def log_cosh(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.logaddexp(student - teacher, teacher - student).mean(-1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_distance_of_ones_own_equals_its_closed_form(reduction: Any, impl: str) -> None:
    """log(2 cosh(y - t)), whose derivative is tanh(y - t), in float64, with a projector and a mask."""
    student, teacher, weight, bias = make()
    mask, formula = some_mask(), FeatureDistanceFormula(name="log_cosh", values=log_cosh)
    found = projected_distance(
        student, teacher, weight=weight, bias=bias, distance=formula, mask=mask, reduction=reduction, impl=impl,
        chunk_size=4,
    )  # fmt: skip
    difference = (student @ weight.T + bias - teacher).detach()
    rows = (2 * torch.cosh(difference)).log().mean(-1).masked_fill(~mask, 0)
    divisor = 1 if reduction == "none" else int(mask.sum())
    torch.testing.assert_close(found.total, rows if reduction == "none" else rows.sum() / divisor, rtol=1e-11, atol=0)
    assert float(found.normalizer) == divisor
    slopes = difference.tanh().masked_fill(~mask[..., None], 0) / difference.shape[-1] / divisor
    gradients = torch.autograd.grad(found.total.sum(), [student, weight, bias])
    expected = slopes @ weight, torch.einsum("btd,bts->ds", slopes, student), slopes.sum((0, 1))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda student, teacher: student - teacher, "wrong shape"),
        (lambda student, teacher: (student.detach() - teacher).sum(-1), "no gradient"),
    ],
)
def test_a_formula_that_does_not_fit_is_refused(values: Callable[..., Any], words: str, impl: str) -> None:
    student, teacher, weight, _ = make()
    with pytest.raises(UsageError, match=words):
        projected_distance(
            student, teacher, weight=weight, distance=FeatureDistanceFormula(name="mine", values=values), impl=impl
        )


def test_a_formula_names_its_sides_and_has_no_kernel_of_its_own() -> None:
    with pytest.raises(UsageError, match="student and teacher"):
        FeatureDistanceFormula(name="mine", values=lambda y, t: (y - t).sum(-1))
    with pytest.raises(UsageError, match="no kernel for the distance 'log_cosh'"):
        projected_distance(
            *make()[:2],
            weight=make()[2],
            distance=FeatureDistanceFormula(name="log_cosh", values=log_cosh),
            impl="fused",
        )
