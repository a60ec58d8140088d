"""`linear_divergence` by its Triton kernel: against dense float64 formulas, by an error budget.

The budget is three-way: an error against float64 may be a small multiple of the error that the dense formula itself has
in the precision at hand, plus a few roundings. Without a GPU, kernels run in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.flat import flat_divergence
from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops.dispatch import interpreted
from xarch_kd.ops.divergences import FORMULAS, as_divergence
from xarch_kd.ops.teacher import TeacherTopK

DEVICE = "cpu" if interpreted() else "cuda"
KINDS = tuple(name for name, formula in FORMULAS.items() if formula.kernel is not None)
# Two blocks of the interpreted kernel, the second not full; both heads have rows that are padding.
VOCABULARY, STUDENT_ROWS, TEACHER_ROWS = 157, 170, 160
TOKENS = 4
EPSILON = torch.finfo(torch.float32).eps
# The kernel adds in another order than the formula, so its error may be that of another draw of roundings.
MULTIPLE, ROUNDINGS = 4.0, 16.0


class _Round(torch.autograd.Function):
    """Rounds values to one dtype on the way there and gradients to another on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, there: torch.dtype, back: torch.dtype) -> Tensor:
        ctx.back = back
        return values.to(there).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream[0].to(ctx.back).to(upstream[0].dtype), None, None


def _divergence(kind: str, share: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()

    def to_mixture(of_p: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(of_p), log_q + math.log(1 - of_p))

    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "jsd":
        middle = to_mixture(share)
        return share * (p * (log_p - middle)).sum(-1) + (1 - share) * (q * (log_q - middle)).sum(-1)
    if kind == "skew_forward_kl":
        return (p * (log_p - to_mixture(share))).sum(-1)
    if kind == "skew_reverse_kl":
        return (q * (log_q - to_mixture(1 - share))).sum(-1)
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    power = (share * log_p + (1 - share) * log_q).exp().sum(-1)
    return (power - 1) / (share * (share - 1)) if kind == "alpha" else power.log() / (share - 1)


def _softcap(z: Tensor, cap: float | None) -> Tensor:
    return z if cap is None else cap * torch.tanh(z / cap)


def _dense(
    inputs: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, there: torch.dtype, back: torch.dtype
) -> Tensor:
    """The total in `dtype`, products of hidden states and heads rounded to `there` and their gradients to `back`."""
    wide = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def logits(name: str) -> Tensor:
        z = wide[f"{name}_hidden"] @ wide[f"{name}_weight"][:VOCABULARY].T
        z = _Round.apply(z, there, back)
        bias = wide.get(f"{name}_bias")
        z = z if bias is None else z + bias[:VOCABULARY]
        return _softcap(z * options.get(f"{name}_scale", 1.0), options.get(f"{name}_softcap"))

    temperature = options.get("temperature", 1.0)
    student, teacher = logits("student"), logits("teacher").detach()
    kind = options["divergence"]
    rows = options.get("divergence_weight", 1.0) * _divergence(
        kind,
        as_divergence(kind).parameter or 0.0,
        (teacher / temperature).log_softmax(-1),
        (student / temperature).log_softmax(-1),
    )
    weights = torch.ones_like(rows)
    labels = wide.get("labels")
    if labels is not None:
        counts = labels != -100
        likelihood = student.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
        rows, weights = rows - options["cross_entropy"] * likelihood, weights * counts
    if "token_weights" in wide:
        weights = weights * wide["token_weights"]
    return (rows * weights).sum() / weights.sum()


def _inputs(
    seed: int, dtype: torch.dtype = torch.float32, deviation: float = 3.0, full: bool = True
) -> dict[str, Tensor]:
    """Hidden states and heads whose logits have this standard deviation; `full`: with everything optional."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(dtype).to(DEVICE)

    inputs = {
        "student_hidden": draw(1, TOKENS, 7),
        "student_weight": draw(STUDENT_ROWS, 7, size=deviation / math.sqrt(7)),
        "teacher_hidden": draw(1, TOKENS, 10),
        "teacher_weight": draw(TEACHER_ROWS, 10, size=deviation / math.sqrt(10)),
    }
    if full:
        inputs |= {"student_bias": draw(STUDENT_ROWS), "teacher_bias": draw(TEACHER_ROWS)}
        inputs["labels"] = torch.tensor([[3, VOCABULARY - 1, -100, 0]], device=DEVICE)
        inputs["token_weights"] = torch.tensor([[1.0, 0.5, 1.0, 2.0]], device=DEVICE)
    return inputs


FULL: dict[str, Any] = {
    "temperature": 2.0,
    "divergence_weight": 4.0,
    "cross_entropy": 0.5,
    "student_softcap": 10.0,
    "teacher_softcap": 12.0,
    "student_scale": 0.7,
    "teacher_scale": 1.3,
}


def _trained(inputs: dict[str, Tensor]) -> list[str]:
    return [name for name in ("student_hidden", "student_weight", "student_bias") if name in inputs]


def _run(total: Callable[..., Tensor], inputs: dict[str, Tensor], *options: Any) -> dict[str, Tensor]:
    """The total and the gradients of the student, from fresh leaves."""
    names = _trained(inputs)
    leaves = {name: value.detach().clone().requires_grad_(name in names) for name, value in inputs.items()}
    value = total(leaves, *options)
    gradients = torch.autograd.grad(value, [leaves[name] for name in names])
    return {"total": value.detach(), **dict(zip(names, gradients, strict=True))}


def _fused(inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    return flat_divergence(**inputs, vocabulary=VOCABULARY, impl="fused", **options).total


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _within_budget(
    inputs: dict[str, Tensor], options: dict[str, Any], there: torch.dtype, back: torch.dtype, **fused: Any
) -> None:
    """Assert the budget, with the dense formula in float32 and these roundings as the yardstick."""
    double = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = _run(_dense, double, options, torch.float64, torch.float64, torch.float64)
    usual = _run(_dense, inputs, options, torch.float32, there, back)
    found = _run(_fused, inputs, options | fused)
    for name, value in exact.items():
        stored = torch.float32 if name == "total" else inputs[name].dtype
        assert found[name].dtype == stored
        floor = ROUNDINGS * EPSILON + (torch.finfo(stored).eps if stored != torch.float32 else 0.0)
        allowed = MULTIPLE * _error(usual[name], value) + floor
        assert _error(found[name], value) <= allowed, (name, _error(found[name], value), allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_value_and_gradients_meet_the_budget(kind: str, full: bool) -> None:
    options = {"divergence": kind, **(FULL if full else {})}
    _within_budget(_inputs(1, full=full), options, torch.float32, torch.float32, chunk_size=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "renyi"])
def test_half_precision_heads_have_float32_logits_and_gradients_of_their_dtype(kind: str, dtype: torch.dtype) -> None:
    _within_budget(_inputs(2, dtype), {"divergence": kind, **FULL}, torch.float32, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_logits(dtype: torch.dtype) -> None:
    rounded = {
        name: value.bfloat16().to(dtype) if name.endswith(("hidden", "weight")) else value
        for name, value in _inputs(3, dtype).items()
    }
    options = {"divergence": "reverse_kl", **FULL}
    _within_budget(rounded, options, torch.bfloat16, torch.bfloat16, logits_dtype="bfloat16")


def test_a_narrow_head_under_wide_hidden_states_is_widened() -> None:
    inputs = _inputs(4)
    inputs |= {name: inputs[name].bfloat16() for name in ("student_weight", "teacher_weight")}
    _within_budget(inputs, {"divergence": "forward_kl", **FULL}, torch.float32, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_next_to_its_teacher_keeps_its_digits(kind: str) -> None:
    """At a KL of some 1e-4 every divergence is a difference of nearly equal terms."""
    inputs = _inputs(5, full=False)
    noise = torch.randn(inputs["teacher_weight"].shape, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    inputs["student_hidden"] = inputs["teacher_hidden"].clone()
    inputs["student_weight"] = inputs["teacher_weight"] + 0.005 * noise
    options = {"divergence": kind}
    double = {name: value.double() for name, value in inputs.items()}
    exact = _run(_dense, double, options, torch.float64, torch.float64, torch.float64)
    found = _run(_fused, inputs, options)
    # A logit of size 10 is off by 1e-6, and so is each log ratio, of size 1e-2; values that are quadratic in it keep
    # only what a sum of terms of both signs, each off by EPSILON times a probability of up to 1, leaves.
    linear = kind == "total_variation"
    assert float(abs(found["total"].double() - exact["total"])) <= (1e-6 if linear else 4 * EPSILON)
    for name in _trained(inputs):
        assert _error(found[name], exact[name]) <= 1e-3


def test_a_mixture_that_is_nearly_the_student_keeps_its_digits() -> None:
    """log(q / m) is a hundredth of a log ratio that is itself a hundredth: 1 + that, rounded, has no fourth digit."""
    inputs = _inputs(19, deviation=0.5, full=False)
    noise = torch.randn(inputs["teacher_weight"].shape, generator=torch.Generator().manual_seed(20)).to(DEVICE)
    inputs["student_hidden"] = inputs["teacher_hidden"].clone()
    inputs["student_weight"] = inputs["teacher_weight"] + 0.002 * noise
    divergence = {"kind": "jsd", "beta": 0.01}
    double = {name: value.double() for name, value in inputs.items()}
    exact = _run(
        lambda leaves: flat_divergence(**leaves, vocabulary=VOCABULARY, divergence=divergence, impl="reference").total,
        double,
    )
    found = _run(_fused, inputs, {"divergence": divergence})
    for name in _trained(inputs):
        # Log-probabilities of about -5, two roundings of 2^-22 of them over log ratios of about 0.006.
        assert _error(found[name], exact[name]) <= 2 * 2.0**-22 / 0.006, _error(found[name], exact[name])


@pytest.mark.filterwarnings("ignore:.* is saturated")
@pytest.mark.parametrize("deviation", [15.0, 40.0])
@pytest.mark.parametrize("kind", KINDS)
def test_nearly_one_hot_students_have_exact_gradients(kind: str, deviation: float) -> None:
    """If q is nearly one-hot, f' and its mean cancel and the true gradient may vanish: errors are absolute."""
    options = {"divergence": kind}
    inputs = _inputs(7, deviation=deviation, full=False)
    double = {name: value.double() for name, value in inputs.items()}
    exact = _run(_dense, double, options, torch.float64, torch.float64, torch.float64)
    found = _run(_fused, inputs, options)
    # A logit of some 4 standard deviations is off by its rounding, which moves a probability by as large a share.
    rounding = 4 * deviation * EPSILON
    assert _error(found["total"], exact["total"]) <= 2 * rounding
    for name in _trained(inputs):
        other = inputs["student_weight" if name == "student_hidden" else "student_hidden"]
        steepness = max(1.0, float(exact["total"]))
        allowed = 2 * rounding * steepness * float(other.abs().max())
        assert float((found[name].double() - exact[name]).abs().max()) <= allowed


@pytest.mark.filterwarnings("ignore:.* is saturated")
def test_centering_keeps_the_digits_of_a_gradient_that_is_small() -> None:
    """Without it the jsd of one-hot rows has an absolute noise of 1e-7 a logit and no digit of a gradient below."""
    found, exact = {}, {}
    inputs = _inputs(8, deviation=15.0, full=False)
    double = {name: value.double() for name, value in inputs.items()}
    for kind in ("jsd", "total_variation", "reverse_kl"):
        options = {"divergence": kind, "divergence_weight": 1e6}
        exact[kind] = _run(_dense, double, options, torch.float64, torch.float64, torch.float64)["student_hidden"]
        found[kind] = _run(_fused, inputs, options)["student_hidden"]
        row_errors = (found[kind].double() - exact[kind]).norm(dim=-1) / exact[kind].norm(dim=-1)
        # Logits of size 60 off by a rounding of their own, 4e-6, and the log ratio by as much.
        assert float(row_errors.median()) <= 4e-5, (kind, row_errors)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_reverse_kl"])
def test_padding_and_ignored_tokens_get_exactly_zero(kind: str) -> None:
    inputs = _inputs(9)
    options: dict[str, Any] = {"divergence": kind, "mask": torch.tensor([[True, True, True, False]]).to(DEVICE)}
    found = _run(_fused, inputs, options | FULL)
    assert not found["student_weight"][VOCABULARY:].any()
    assert not found["student_bias"][VOCABULARY:].any()
    assert not found["student_hidden"][0, [2, 3]].any()
    assert found["student_hidden"][0, [0, 1]].any(-1).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_agree_with_streaming(reduction: str) -> None:
    inputs = _inputs(10)
    upstream = torch.linspace(0.0, 2.0, TOKENS, device=DEVICE)

    def total(leaves: dict[str, Tensor], impl: str) -> Tensor:
        result = flat_divergence(**leaves, **FULL, vocabulary=VOCABULARY, reduction=reduction, impl=impl, chunk_size=2)
        assert result.cross_entropy is not None and not result.cross_entropy.requires_grad
        parts.append((result.divergence, result.cross_entropy))
        return (result.total * upstream).sum() if reduction == "none" else result.total

    parts: list[tuple[Tensor, Tensor]] = []
    found, expected = _run(total, inputs, "fused"), _run(total, inputs, "streaming")
    for name, value in expected.items():
        # Two orders of summation of the same float32 terms.
        assert _error(found[name], value.double()) <= ROUNDINGS * EPSILON
    for mine, its in zip(*parts, strict=True):
        torch.testing.assert_close(mine, its, rtol=ROUNDINGS * EPSILON, atol=EPSILON)


def test_a_normalised_jsd_and_a_divergence_at_the_end_of_its_range() -> None:
    inputs = _inputs(11, full=False)
    for divergence in ({"kind": "jsd", "beta": 0.2, "normalised": True}, {"kind": "alpha", "alpha": -0.5}, "jsd"):
        found = _run(_fused, inputs, {"divergence": divergence})
        expected = _run(
            lambda leaves, chosen: (
                flat_divergence(**leaves, vocabulary=VOCABULARY, divergence=chosen, impl="reference").total
            ),
            {name: value.double() for name, value in inputs.items()},
            divergence,
        )
        for name, value in expected.items():
            assert _error(found[name], value) <= 1e-5
    end = _run(_fused, inputs, {"divergence": {"kind": "skew_reverse_kl", "alpha": 0.0}})["total"]
    assert float(end) == float(_run(_fused, inputs, {"divergence": "reverse_kl"})["total"])


def test_a_teacher_as_logits_is_the_teacher() -> None:
    """Its rows are as wide as its head, padding included, and are not written to."""
    inputs = _inputs(16)
    head = {name: inputs.pop(f"teacher_{name}") for name in ("hidden", "weight", "bias")}
    logits = _softcap((head["hidden"] @ head["weight"].T + head["bias"]) * 1.3, 12.0)
    given = {**inputs, "teacher_logits": logits.transpose(-1, -2).contiguous().transpose(-1, -2)}
    options = {"divergence": "jsd", **{name: FULL[name] for name in FULL if not name.startswith("teacher")}}
    found = _run(_fused, given, options)
    assert torch.equal(given["teacher_logits"], logits)
    expected = _run(_fused, inputs | {f"teacher_{name}": value for name, value in head.items()}, FULL | options)
    for name, value in expected.items():
        # The same logits, multiplied in another order.
        assert _error(found[name], value.double()) <= ROUNDINGS * EPSILON


def test_a_teacher_as_its_likeliest_entries_has_no_kernel() -> None:
    inputs = _inputs(17, full=False)
    logits = inputs.pop("teacher_hidden") @ inputs.pop("teacher_weight").T
    top = TeacherTopK.from_logits(logits[..., :VOCABULARY], 4)
    with pytest.raises(UsageError, match="no kernel for a teacher given as its likeliest entries"):
        flat_divergence(
            inputs["student_hidden"], inputs["student_weight"], teacher_top_k=top, vocabulary=VOCABULARY, impl="fused"
        )


@pytest.mark.parametrize("kind", ["jsd", "total_variation"])
def test_most_tokens_saturated_is_warned_of(kind: str) -> None:
    inputs = _inputs(18, deviation=60.0, full=False)
    inputs["student_hidden"].requires_grad_()
    with pytest.warns(UserWarning, match=f"{kind} is saturated"):
        _fused(inputs, {"divergence": kind})
    _fused(inputs, {"divergence": "forward_kl"})


def test_no_gradient_is_computed_where_none_is_asked_for() -> None:
    inputs = _inputs(12)
    frozen = inputs["student_weight"].clone()
    hidden = inputs["student_hidden"].clone().requires_grad_()
    result = _fused(inputs | {"student_hidden": hidden}, {"divergence": "jsd", **FULL})
    result.backward()
    expected = _run(_fused, inputs, {"divergence": "jsd", **FULL})
    assert hidden.grad is not None and torch.equal(hidden.grad, expected["student_hidden"])
    assert torch.equal(frozen, inputs["student_weight"])
    with torch.no_grad():
        assert not _fused(inputs, {"divergence": "jsd", **FULL}).requires_grad


def test_float16_gradients_survive_a_mean_over_many_tokens() -> None:
    """1e-6 of a gradient is below what float16 can hold, and comes back when autograd multiplies by a loss scale."""
    inputs = _inputs(13, torch.float16, full=False)
    scaled = _run(lambda leaves: _fused(leaves, {"reduction": "sum", "divergence_weight": 1e-6}) * 1e6, inputs)
    plain = _run(_fused, inputs, {"reduction": "sum"})
    for name in _trained(inputs):
        # A rounding of float16 in the gradient of each logit, and one of the result.
        assert _error(scaled[name], plain[name].double()) <= 4 * torch.finfo(torch.float16).eps


def test_no_token_sums_to_zero() -> None:
    inputs = _inputs(14, full=False)
    nothing = {"mask": torch.zeros(1, TOKENS, dtype=torch.bool, device=DEVICE), "reduction": "sum"}
    found = _run(_fused, inputs, nothing)
    assert all(not value.any() for value in found.values())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", ["student_hidden", "teacher_hidden"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_an_error(where: str, value: float) -> None:
    inputs = _inputs(15, full=False)
    inputs[where][0, 1, 2] = value
    with pytest.raises(NonFiniteLoss, match="not finite"):
        _fused(inputs, {"divergence": "total_variation"})
