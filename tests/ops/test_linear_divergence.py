"""`linear_divergence` against formulas reimplemented in float64, and the streamed form against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.flat import flat_divergence
from xarch_kd.ops import DivergenceLoss
from xarch_kd.ops.divergences import as_divergence
from xarch_kd.ops.streaming.row_gradients import rows_with_gradient

TOKENS, VOCABULARY, STUDENT_ROWS, TEACHER_ROWS = (3, 7), 61, 61, 72
IMPLEMENTATIONS = ("reference", "streaming")

# Each divergence straight from probabilities, as the papers print it.
FORMULAS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward_kl": ("forward_kl", lambda p, q: (p * (p / q).log()).sum(-1)),
    "reverse_kl": ("reverse_kl", lambda p, q: (q * (q / p).log()).sum(-1)),
    "jsd": ({"kind": "jsd", "beta": 0.3}, lambda p, q: _jsd(p, q, 0.3)),
    "jsd, half": ("jsd", lambda p, q: _jsd(p, q, 0.5)),
    "jsd, normalised": ({"kind": "jsd", "beta": 0.9, "normalised": True}, lambda p, q: _jsd(p, q, 0.9) / 0.09),
    "jsd at 0": ({"kind": "jsd", "beta": 0.0}, lambda p, q: (p * (p / q).log()).sum(-1)),
    "jsd at 1": ({"kind": "jsd", "beta": 1, "normalised": True}, lambda p, q: (q * (q / p).log()).sum(-1)),
    "skew_forward_kl": (
        {"kind": "skew_forward_kl", "alpha": 0.2},
        lambda p, q: (p * (p / (0.2 * p + 0.8 * q)).log()).sum(-1),
    ),
    "skew_reverse_kl": (
        {"kind": "skew_reverse_kl", "alpha": 0.2},
        lambda p, q: (q * (q / (0.2 * q + 0.8 * p)).log()).sum(-1),
    ),
    "total_variation": ("total_variation", lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    "alpha": ({"kind": "alpha", "alpha": 0.3}, lambda p, q: ((p**0.3 * q**0.7).sum(-1) - 1) / (0.3 * -0.7)),
    "alpha above 1": ({"kind": "alpha", "alpha": 1.4}, lambda p, q: ((p**1.4 * q**-0.4).sum(-1) - 1) / (1.4 * 0.4)),
    "renyi": ({"kind": "renyi", "alpha": 0.6}, lambda p, q: (p**0.6 * q**0.4).sum(-1).log() / -0.4),
    "renyi above 1": ({"kind": "renyi", "alpha": 2.0}, lambda p, q: (p**2 / q).sum(-1).log()),
    "alpha_beta": (
        {"kind": "alpha_beta", "alpha": 0.3, "beta": 0.5},
        lambda p, q: -(p**0.3 * q**0.5 - 0.375 * p**0.8 - 0.625 * q**0.8).sum(-1) / 0.15,
    ),
    "entropy_aware": ({"kind": "entropy_aware", "threshold": 3.33}, lambda p, q: _entropy_aware(p, q, 3.33)),
    "adaptive_kl": ("adaptive_kl", lambda p, q: _adaptive(p, q, 0.5)),
}


def _entropy_aware(p: Tensor, q: Tensor, threshold: float) -> Tensor:
    is_open = -(p * p.log()).sum(-1) > threshold
    assert is_open.any() and not is_open.all()
    return torch.where(is_open, (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1))


def _adaptive(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """Entry by entry, as the paper sorts them."""
    own, other = p.detach(), q.detach()
    weights = torch.zeros(p.shape[:-1], dtype=p.dtype)
    for row in product(*map(range, p.shape[:-1])):
        order = sorted(range(p.shape[-1]), key=lambda entry: -float(own[row][entry]))
        gaps, mass, head = [abs(float(own[row][entry] - other[row][entry])) for entry in order], 0.0, 0.0
        for place, entry in enumerate(order):
            mass += float(own[row][entry])
            if place and mass > head_mass:
                break
            head += gaps[place]
        weights[row] = head / sum(gaps)
    return weights * (p * (p / q).log()).sum(-1) + (1 - weights) * (q * (q / p).log()).sum(-1)


def _jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; the student's three have gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(**{name: tensor.detach().to(dtype) for name, tensor in vars(self).items()}).training()

    def training(self) -> Inputs:
        for name in ("student_hidden", "student_weight", "student_bias"):
            getattr(self, name).requires_grad_()
        return self

    def gradients(self) -> list[Tensor]:
        found = [self.student_hidden.grad, self.student_weight.grad, self.student_bias.grad]
        return [gradient for gradient in found if gradient is not None]


def make_inputs(
    dtype: torch.dtype = torch.float64, *, spread: float = 2.0, seed: int = 0, tokens: Any = TOKENS
) -> Inputs:
    """Return random inputs whose logits have a standard deviation of about `spread`, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = Inputs(
        student_hidden=normal(*tokens, 16),
        student_weight=normal(STUDENT_ROWS, 16) * (spread / 4),
        student_bias=normal(STUDENT_ROWS) * 0.5,
        teacher_hidden=normal(*tokens, 24),
        teacher_weight=normal(TEACHER_ROWS, 24) * (spread / 24**0.5),
        teacher_bias=normal(TEACHER_ROWS) * 0.5,
    )
    return inputs.to(dtype)


def call(inputs: Inputs, **options: Any) -> DivergenceLoss:
    return flat_divergence(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        student_bias=inputs.student_bias,
        teacher_bias=inputs.teacher_bias,
        **options,
    )


def logits(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, cap: float | None, vocabulary: int) -> Tensor:
    raw = scale * (torch.einsum("...d,vd->...v", hidden, weight) + bias)
    return (raw if cap is None else cap * torch.tanh(raw / cap))[..., :vocabulary]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_equal_the_printed_formula(name: str, impl: str) -> None:
    """Everything at once, in float64: temperature, labels, mask, weights, biases, scales, softcaps, padding."""
    divergence, formula = FORMULAS[name]
    temperature, vocabulary, ours = 1.7, 57, make_inputs()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocabulary, TOKENS, generator=generator)
    labels[0, 2] = labels[2, 6] = -100
    mask = torch.rand(TOKENS, generator=generator) < 0.7
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    weights[1, 1] = 0.0

    loss = call(
        ours,
        divergence=divergence,
        temperature=temperature,
        labels=labels,
        divergence_weight=0.8,
        cross_entropy=0.5,
        mask=mask,
        token_weights=weights,
        student_scale=0.7,
        teacher_scale=1.2,
        student_softcap=6.0,
        teacher_softcap=9.0,
        vocabulary=vocabulary,
        impl=impl,
        chunk_size=4,
    )
    (3 * loss.total).backward()

    theirs = make_inputs()
    z = logits(theirs.student_hidden, theirs.student_weight, theirs.student_bias, 0.7, 6.0, vocabulary)
    t = logits(theirs.teacher_hidden, theirs.teacher_weight, theirs.teacher_bias, 1.2, 9.0, vocabulary)
    rows = formula((t / temperature).softmax(-1), (z / temperature).softmax(-1))
    cross = -z.softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).log()
    w = torch.where(mask & (labels != -100), weights, 0.0)
    expected = ((0.8 * rows + 0.5 * cross) * w).sum() / w.sum()
    (3 * expected).backward()

    # float64 with at most a few hundred operations an entry: 1e-12 is four digits above its rounding.
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss.divergence, (rows * w).sum().detach() / w.sum(), rtol=1e-12, atol=1e-13)
    assert loss.cross_entropy is not None
    torch.testing.assert_close(loss.cross_entropy, (cross * w).sum().detach() / w.sum(), rtol=1e-12, atol=1e-13)
    assert not loss.divergence.requires_grad and not loss.cross_entropy.requires_grad
    for mine, other in zip(ours.gradients(), theirs.gradients(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)
    assert ours.student_weight.grad is not None
    assert torch.count_nonzero(ours.student_weight.grad[vocabulary:]) == 0
    assert ours.student_hidden.grad is not None
    assert torch.count_nonzero(ours.student_hidden.grad[w == 0]) == 0


@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_chunks_need_not_divide_the_tokens(chunk: int, reduction: str) -> None:
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[1, 2:5] = False
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    results = []
    for impl in IMPLEMENTATIONS:
        inputs = make_inputs()
        loss = call(
            inputs, divergence="jsd", mask=mask, token_weights=weights, reduction=reduction, impl=impl, chunk_size=chunk
        )
        upstream = (
            torch.linspace(-1, 2, 21, dtype=torch.float64).view(TOKENS) if reduction == "none" else torch.ones(())
        )
        (loss.total * upstream).sum().backward()
        results.append([loss.total.detach(), loss.divergence, *inputs.gradients()])
    for streamed, dense in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(streamed, dense, rtol=1e-11, atol=1e-13)
    if reduction == "none":
        assert results[1][0].shape == TOKENS
        assert torch.count_nonzero(results[1][0][1, 2:5]) == 0


def relative_errors(dtype: torch.dtype, impl: str, divergence: Any, spread: float) -> list[float]:
    """Return the errors of value and gradients against float64 on the same rounded inputs, over their largest entry."""
    inputs = make_inputs(dtype, spread=spread)
    results = []
    for case, how in ((inputs, impl), (inputs.to(torch.float64), "reference")):
        total = call(case, divergence=divergence, temperature=2.0, impl=how, chunk_size=5).total
        total.backward()
        results.append([total.detach(), *case.gradients()])
    return [float((mine.double() - true).abs().max() / true.abs().max()) for mine, true in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_error_is_within_the_budget_of_the_dense_form(name: str, dtype: torch.dtype) -> None:
    """Streamed error against float64 <= 4 x the dense form's in the same precision + one rounding of the result.

    Values are float32, so their rounding is float32's; gradients are rounded to the inputs' dtype. The float32 band is
    64 roundings, for sums over 61 entries in another order.
    """
    divergence = FORMULAS[name][0]
    dense = relative_errors(dtype, "reference", divergence, 2.0)
    streamed = relative_errors(dtype, "streaming", divergence, 2.0)
    single = 64 * torch.finfo(torch.float32).eps
    bands = [single] + [max(single, torch.finfo(dtype).eps)] * 3
    for mine, theirs, band in zip(streamed, dense, bands, strict=True):
        assert mine <= 4 * theirs + band


@pytest.mark.filterwarnings("ignore:.* is saturated")
@pytest.mark.parametrize("spread", [30.0, 120.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_logits_far_apart_stay_finite_and_right(name: str, spread: float) -> None:
    """Ratios p / q beyond the range of float32: log-probabilities err by the spacing of the logits, about 4 spreads."""
    dense = relative_errors(torch.float32, "reference", FORMULAS[name][0], spread)
    streamed = relative_errors(torch.float32, "streaming", FORMULAS[name][0], spread)
    for mine, theirs in zip(streamed, dense, strict=True):
        assert mine <= 4 * theirs + 64 * 4 * spread * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skew_reverse_kl", "total_variation"])
def test_nearly_one_hot_students_keep_the_digits_of_their_gradient(name: str) -> None:
    """Without centering the two terms of the gradient cancel there and the median row is 3 to 100 % wrong."""
    generator = torch.Generator().manual_seed(0)
    logits_p, logits_q = (15 * torch.randn(2, 400, 300, generator=generator)).unbind()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        log_p, log_q = (z.to(dtype).log_softmax(-1) for z in (logits_p, logits_q))
        _, gradient = rows_with_gradient(as_divergence(FORMULAS[name][0]), log_q, log_p, True)
        assert gradient is not None
        gradients.append(gradient.double())
    errors = (gradients[0] - gradients[1]).norm(dim=-1) / gradients[1].norm(dim=-1)
    # Logits up to 60 have a spacing of 4e-6; a term errs by a few of them.
    assert errors.median() < 16 * 4e-6


@pytest.mark.parametrize("name", FORMULAS)
def test_near_convergence_nothing_drowns(name: str) -> None:
    """A student 1e-3 away from the teacher in logits: the gradient is right to float32's rounding of the logits."""
    errors = []
    for dtype in (torch.float64, torch.float32):
        base = make_inputs(torch.float32).to(dtype)
        noise = torch.randn(STUDENT_ROWS, generator=torch.Generator().manual_seed(5)) * 1e-3
        near = replace(
            base,
            teacher_hidden=base.student_hidden.detach(),
            teacher_weight=base.student_weight.detach(),
            teacher_bias=(base.student_bias.detach().float() + noise).to(dtype),
        )
        loss = call(near, divergence=FORMULAS[name][0], chunk_size=5)
        loss.total.backward()
        errors.append([loss.total.detach().double(), *(gradient.double() for gradient in near.gradients())])
    # Logits up to 8 have a spacing of 5e-7 to 1e-6 in float32: relative to a signal of 1e-3, 1e-3 a term.
    # Total variation's gradient is a sign, which flips where a difference is below that spacing.
    tolerance = 2e-2 if name == "total_variation" else 4e-3
    for single, double in zip(errors[1][1:], errors[0][1:], strict=True):
        assert float((single - double).abs().max() / double.abs().max()) < tolerance


def test_mixed_dtypes_are_computed_in_float32() -> None:
    inputs = make_inputs(torch.float32)
    half = inputs.to(torch.bfloat16)
    mixed = replace(inputs, teacher_weight=half.teacher_weight.detach(), teacher_hidden=half.teacher_hidden.detach())
    widened = replace(mixed, teacher_weight=mixed.teacher_weight.float(), teacher_hidden=mixed.teacher_hidden.float())
    loss = call(mixed, chunk_size=5).total
    assert loss.dtype == torch.float32
    assert torch.equal(loss, call(widened, chunk_size=5).total)


def test_a_wide_head_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import xarch_kd.ops.streaming.logits as module

    whole, blocked = make_inputs(torch.bfloat16), make_inputs(torch.bfloat16)
    first = call(whole, chunk_size=6).total
    first.backward()
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 7 * 16)
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    second = call(blocked, chunk_size=6).total
    second.backward()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)
    for one, other in zip(whole.gradients(), blocked.gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-7)


def test_autocast_does_not_narrow_the_logits() -> None:
    inputs = make_inputs(torch.float32)
    expected = call(inputs).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl in IMPLEMENTATIONS:
            torch.testing.assert_close(call(inputs, impl=impl).total, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight", "student_bias"])
def test_only_what_trains_gets_a_gradient(frozen: str) -> None:
    full, partial = make_inputs(), make_inputs()
    getattr(partial, frozen).requires_grad_(False)
    for inputs in (full, partial):
        call(inputs, chunk_size=5).total.backward()
    for name in ("student_hidden", "student_weight", "student_bias"):
        if name == frozen:
            assert getattr(partial, name).grad is None
        else:
            torch.testing.assert_close(getattr(partial, name).grad, getattr(full, name).grad, rtol=1e-12, atol=1e-14)


def test_the_teacher_gets_no_gradient() -> None:
    for impl in IMPLEMENTATIONS:
        inputs = make_inputs()
        inputs.teacher_hidden.requires_grad_()
        inputs.teacher_weight.requires_grad_()
        call(inputs, impl=impl).total.backward()
        assert inputs.teacher_hidden.grad is None
        assert inputs.teacher_weight.grad is None


def test_a_head_tied_to_an_embedding_adds_up() -> None:
    """The head's gradient joins what the same parameter gets elsewhere, and the teacher's copy stays out."""
    gradients = []
    for impl in IMPLEMENTATIONS:
        inputs = make_inputs()
        tied = inputs.student_weight
        hidden = tied[:21].view(3, 7, 16) * 2
        flat_divergence(hidden, tied, hidden, tied * 1.5, impl=impl, chunk_size=4).total.backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", FORMULAS)
def test_identical_models_have_no_divergence(name: str) -> None:
    given = make_inputs()
    head, hidden = given.student_weight.detach(), given.student_hidden.detach()
    for dtype in (torch.float64, torch.float32):
        states, weight = hidden.to(dtype), head.to(dtype, copy=True).requires_grad_()
        loss = flat_divergence(states, weight, states, weight.detach(), divergence=FORMULAS[name][0])
        assert float(loss.total.detach()) == 0.0
        loss.total.backward()
        assert weight.grad is not None and float(weight.grad.abs().max()) < 1e-6
        log_q = (states @ weight.detach().T).log_softmax(-1)
        dense = as_divergence(FORMULAS[name][0]).limit().values(log_q, log_q)
        # Divergences from a mixture have the rounding of its logarithm.
        assert dense.min() >= 0 and float(dense.max()) <= (1e-13 if "jsd" in name or "skew" in name else 0.0)
