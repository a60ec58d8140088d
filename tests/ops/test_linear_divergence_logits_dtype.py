"""`linear_divergence` with `logits_dtype="bfloat16"`: rounded logits, exact sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.flat import flat_divergence
from xarch_kd.errors import UsageError

TOKENS, VOCABULARY, WIDTH = 24, 300, 32
NAMES = ("student_hidden", "student_weight", "student_bias")


def make(dtype: torch.dtype, *, distance: float = 1.0) -> dict[str, Tensor]:
    """Return inputs whose logits have a standard deviation of about 3 and differ by `distance` times that."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = normal(TOKENS, WIDTH), normal(VOCABULARY, WIDTH) * (3 / WIDTH**0.5), normal(VOCABULARY)
    given = {
        "student_hidden": hidden,
        "student_weight": weight,
        "student_bias": bias,
        "teacher_hidden": hidden + distance * normal(TOKENS, WIDTH),
        "teacher_weight": weight,
        "teacher_bias": bias,
    }
    given = {name: tensor.to(dtype, copy=True) for name, tensor in given.items()}
    return {name: tensor.requires_grad_(name in NAMES) for name, tensor in given.items()}


def value_and_gradients(given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    total = flat_divergence(**given, **options).total  # pyright: ignore[reportArgumentType]
    total.backward()
    gradients = [given[name].grad for name in NAMES]
    return [total.detach().double(), *(gradient.double() for gradient in gradients if gradient is not None)]


def errors(dtype: torch.dtype, impl: str, logits_dtype: str, **options: Any) -> list[float]:
    """Return the errors of value and gradients against float64 on the same inputs, in the Frobenius norm."""
    distance = options.pop("distance", 1.0)
    given = make(dtype, distance=distance)
    wide = {name: tensor.detach().double().requires_grad_(name in NAMES) for name, tensor in given.items()}
    true = value_and_gradients(wide, impl="reference", **options)
    mine = value_and_gradients(given, impl=impl, logits_dtype=logits_dtype, **options)
    return [float((one - other).norm() / other.norm()) for one, other in zip(mine, true, strict=True)]


OPTIONS: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "jsd, softcap, labels": {
        "divergence": "jsd",
        "student_softcap": 8.0,
        "teacher_softcap": 8.0,
        "student_scale": 0.8,
        "labels": torch.arange(TOKENS),
        "cross_entropy": 0.5,
        "temperature": 2.0,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_streamed_error_is_within_the_budget_of_the_dense_form(name: str, dtype: torch.dtype) -> None:
    """Streamed error <= 2 x the dense form's at the same logits dtype + a rounding of the result to bfloat16."""
    dense = errors(dtype, "reference", "bfloat16", **OPTIONS[name])
    streamed = errors(dtype, "streaming", "bfloat16", chunk_size=7, **OPTIONS[name])
    for mine, theirs in zip(streamed, dense, strict=True):
        assert mine <= 2 * theirs + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("impl", ["reference", "streaming"])
def test_narrow_logits_drown_the_gradient_near_convergence_and_float32_ones_do_not(impl: str) -> None:
    """A student 1e-2 away from its teacher. bfloat16 rounds logits of about 3 by up to 8e-3, as much as the signal."""
    assert errors(torch.float32, impl, "bfloat16", distance=1e-2)[1] > 0.1
    assert errors(torch.float32, impl, "bfloat16", distance=1.0)[1] < 0.05
    # float32 spaces logits of up to 16 by 1e-6, the signal is 3e-2.
    for logits_dtype in ("auto", "float32"):
        assert errors(torch.float32, impl, logits_dtype, distance=1e-2)[1] < 4 * 1e-6 / 3e-2


def test_auto_is_float32_and_float64_stays_float64() -> None:
    given = make(torch.float32)
    wanted = value_and_gradients(given, logits_dtype="float32")
    for mine, other in zip(value_and_gradients(make(torch.float32)), wanted, strict=True):
        assert torch.equal(mine, other)
    for logits_dtype in ("auto", "float32"):
        assert max(errors(torch.float64, "streaming", logits_dtype)) < 1e-12


def test_a_head_gradient_is_summed_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 chunks of one token: each product is rounded to bfloat16, a sum kept in bfloat16 would err by more."""
    import xarch_kd.ops.streaming.logits as module

    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 64 * WIDTH)
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    whole = value_and_gradients(make(torch.bfloat16), logits_dtype="bfloat16", chunk_size=TOKENS)
    chunked = value_and_gradients(make(torch.bfloat16), logits_dtype="bfloat16", chunk_size=1)
    assert float((whole[2] - chunked[2]).norm() / whole[2].norm()) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("dtype", "asked", "words"),
    [
        (torch.float32, "bfloat", ["logits_dtype", "Did you mean 'bfloat16'?", "auto | float32 | bfloat16"]),
        (torch.float32, "float16", ["logits_dtype", "float16", "auto | float32 | bfloat16"]),
        (torch.float64, "bfloat16", ["float64 inputs keep float64 logits", "auto"]),
    ],
)
def test_what_is_refused(dtype: torch.dtype, asked: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        flat_divergence(**make(dtype), logits_dtype=asked)  # pyright: ignore[reportArgumentType]
    for word in words:
        assert word in str(caught.value)
