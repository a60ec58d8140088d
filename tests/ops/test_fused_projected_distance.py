"""`projected_distance` by its Triton kernel: against dense float64 formulas, by an error budget.

The error against float64 may be a small multiple of that of the dense formula in float32, its gradient rounded as the
kernel rounds it, plus a few roundings. Without a GPU, kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.kernels import projected_distance as kernels
from xarch_kd.ops import projected_distance
from xarch_kd.ops.dispatch import interpreted
from xarch_kd.ops.feature_distances import FORMULAS

DEVICE = "cpu" if interpreted() else "cuda"
KINDS = tuple(FORMULAS)
# Three blocks of the interpreted kernel, the last not full.
TEACHER_WIDTH, STUDENT_WIDTH, TOKENS = 131, 9, 5
EPSILON = torch.finfo(torch.float32).eps
MULTIPLE, ROUNDINGS = 4.0, 16.0
SMALL = 1e-3


class _RoundBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream[0].to(ctx.dtype).to(upstream[0].dtype), None


def _dense(inputs: dict[str, Tensor], kind: str, dtype: torch.dtype, back: torch.dtype) -> Tensor:
    """The mean over tokens of a distance, or the ratio of sums."""
    wide = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    y, t, keep = wide["student"], wide["teacher"], wide["mask"]
    if "weight" in wide:
        y = y @ wide["weight"].T
    y = _RoundBack.apply(y + wide["bias"] if "bias" in wide else y, back)
    squared, energy = ((y - t) ** 2).sum(-1), (t**2).sum(-1)
    if kind == "relative_mse":
        return squared[keep].sum() / energy[keep].sum()
    rows = {
        "mse": squared / t.shape[-1],
        "squared_error": squared,
        "huber": torch.where((y - t).abs() > 1, (y - t).abs() - 0.5, (y - t) ** 2 / 2).mean(-1),
        "l2": squared.sqrt(),
        "cosine": 1 - (y * t).sum(-1) / (((y**2).sum(-1) + SMALL) * (energy + SMALL)).sqrt(),
        "normalised_mse": squared / (energy + SMALL),
    }[kind]
    return rows[keep].mean()


def _inputs(seed: int, dtype: torch.dtype = torch.float32, projector: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    inputs = {
        "student": draw(1, TOKENS, STUDENT_WIDTH if projector else TEACHER_WIDTH),
        "teacher": draw(1, TOKENS, TEACHER_WIDTH),
        "mask": torch.tensor([[True, False, True, True, True]], device=DEVICE),
    }
    if projector:
        inputs |= {"weight": draw(TEACHER_WIDTH, STUDENT_WIDTH), "bias": draw(TEACHER_WIDTH)}
    return inputs


def _run(total: Callable[..., Tensor], inputs: dict[str, Tensor], *options: Any) -> dict[str, Tensor]:
    names = [name for name in ("student", "weight", "bias") if name in inputs]
    leaves = {name: value.detach().clone().requires_grad_(name in names) for name, value in inputs.items()}
    value = total(leaves, *options)
    gradients = torch.autograd.grad(value, [leaves[name] for name in names])
    return {"total": value.detach(), **dict(zip(names, gradients, strict=True))}


def _fused(inputs: dict[str, Tensor], kind: Any, **options: Any) -> Tensor:
    return projected_distance(**inputs, distance=kind, epsilon=SMALL, impl="fused", **options).total


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _within_budget(inputs: dict[str, Tensor], kind: str, back: torch.dtype) -> None:
    double = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = _run(_dense, double, kind, torch.float64, torch.float64)
    usual = _run(_dense, inputs, kind, torch.float32, back)
    found = _run(lambda leaves: _fused(leaves, kind, chunk_size=3), inputs)
    for name, value in exact.items():
        stored = torch.float32 if name == "total" else inputs[name].dtype
        assert found[name].dtype == stored
        floor = ROUNDINGS * EPSILON + (torch.finfo(stored).eps if stored != torch.float32 else 0.0)
        allowed = MULTIPLE * _error(usual[name], value) + floor
        assert _error(found[name], value) <= allowed, (name, _error(found[name], value), allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projector", [True, False])
def test_value_and_gradients_meet_the_budget(kind: str, projector: bool) -> None:
    _within_budget(_inputs(1, projector=projector), kind, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_packed(kind: str) -> None:
    _within_budget(_inputs(2, torch.bfloat16), kind, torch.bfloat16)


@pytest.mark.parametrize("projector", [True, False])
def test_float16_gradients_are_kept_wide(projector: bool) -> None:
    """A mean's gradient may be below the smallest float16: it comes back when the loss is scaled."""
    inputs = _inputs(3, torch.float16, projector)
    _within_budget(inputs, "normalised_mse", torch.float32)
    small = {name: value / 4096 if name == "student" else value for name, value in inputs.items()}
    scaled = _run(lambda leaves: _fused(leaves, "mse") * 2.0**12, small)
    double = {name: value.double() if value.is_floating_point() else value for name, value in small.items()}
    exact = _run(lambda leaves: _dense(leaves, "mse", torch.float64, torch.float64) * 2.0**12, double)
    for name, value in exact.items():
        assert _error(scaled[name], value) <= torch.finfo(torch.float16).eps


def test_a_narrow_projector_under_wide_features_is_widened() -> None:
    inputs = _inputs(4)
    _within_budget(inputs | {"weight": inputs["weight"].bfloat16()}, "cosine", torch.float32)


@pytest.mark.parametrize("kind", ["cosine", "squared_error"])
def test_one_value_per_token(kind: Any) -> None:
    inputs = _inputs(5)
    upstream = torch.linspace(0.0, 2.0, TOKENS, device=DEVICE)
    values = _fused(inputs, kind, reduction="none")
    assert values.shape == (1, TOKENS) and values[0, 1] == 0

    def total(leaves: dict[str, Tensor], impl: str) -> Tensor:
        rows = projected_distance(
            leaves["student"],
            leaves["teacher"],
            weight=leaves["weight"],
            mask=leaves["mask"],
            distance=kind,
            reduction="none",
            impl=impl,
        ).total
        return (rows * upstream).sum()

    inputs.pop("bias")
    found, expected = _run(total, inputs, "fused"), _run(total, inputs, "reference")
    for name, value in expected.items():
        assert _error(found[name], value.double()) <= ROUNDINGS * EPSILON
    assert not found["student"][0, 1].any()


def test_inputs_stay_as_they_are() -> None:
    """Without a projector the kernel writes over a copy of the student."""
    inputs = _inputs(6, projector=False)
    inputs.pop("mask")
    before = {name: value.clone() for name, value in inputs.items()}
    inputs["student"].requires_grad_()
    _fused(inputs, "mse").backward()
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    strided = inputs["teacher"].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(_fused(inputs | {"teacher": strided}, "mse"), _fused(inputs, "mse"))


def test_huber_turns_at_delta_and_l2_has_no_gradient_at_the_goal() -> None:
    inputs = _inputs(13, projector=False)
    inputs.pop("mask")

    def total(leaves: dict[str, Any], impl: str) -> Tensor:
        return projected_distance(**leaves, distance="huber", delta=0.5, impl=impl).total

    found, expected = _run(total, inputs, "fused"), _run(total, inputs, "reference")
    for name, value in expected.items():
        assert _error(found[name], value.double()) <= ROUNDINGS * EPSILON
    inputs["student"][0, 0] = inputs["teacher"][0, 0]
    gradient = _run(_fused, inputs, "l2")["student"]
    assert not gradient[0, 0].any() and gradient[0, 1].any()


def test_no_gradient_is_asked_for() -> None:
    with torch.no_grad():
        value = _fused(_inputs(7), "cosine")
    assert not value.requires_grad
    assert float(value) == float(_run(_fused, _inputs(7), "cosine")["total"])


def test_bad_input_is_an_error() -> None:
    inputs = _inputs(8)
    inputs["student"][0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="not finite"):
        _fused(inputs, "normalised_mse")
    wide = {name: value.double() if value.is_floating_point() else value for name, value in _inputs(9).items()}
    with pytest.raises(UsageError, match="the kernels take float32, bfloat16 and float16, not float64"):
        _fused(wide, "mse")


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_operator_keeps_what_it_tells_pytorch(scaled: bool, gradient: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(10)
    projected, teacher = (torch.randn(2, TEACHER_WIDTH + 1, generator=generator).to(DEVICE) for _ in range(2))
    scale = torch.ones(2, device=DEVICE) if scaled else None
    arguments = (projected, teacher, None, scale, "cosine", SMALL, gradient)
    torch.library.opcheck(torch.ops.xarch_kd.distance_rows.default, arguments)


def test_offsets_do_not_fit_in_32_bits() -> None:
    """The third row starts at element 2^31. Memory that is not touched is not there."""
    generator = torch.Generator().manual_seed(11)
    near = torch.randn(3, 64, generator=generator).bfloat16().to(DEVICE)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (2**30, 1))
    far.copy_(near)
    projected = near.float() + 1
    for teacher in (near, far):
        values = kernels.distance_rows(projected.clone(), teacher, None, None, "squared_error", SMALL, torch.float32)
        # Each (y + 1) - y is off by a rounding of y + 1, below 8.
        torch.testing.assert_close(values, torch.full_like(values, 64.0), rtol=16 * EPSILON, atol=0)


def test_a_compiled_graph_holds_the_operator_whole() -> None:
    def step(student: Tensor, weight: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        projected = student @ weight.T
        values = kernels.distance_rows(projected, teacher, None, scale, "cosine", SMALL, torch.float32)
        return values, projected @ weight

    inputs = _inputs(12)
    arguments = (inputs["student"][0], inputs["weight"], inputs["teacher"][0], torch.ones(TOKENS, device=DEVICE))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*arguments), step(*arguments)))
