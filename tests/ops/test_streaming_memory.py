"""No tensor of tokens by vocabulary, nor of tokens by teacher width, exists while the streamed forms run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ops.flat import flat_divergence
from xarch_kd.ops import TeacherTopK, projected_distance

TOKENS, VOCABULARY, WIDTH, CHUNK = 64, 900, 16, 8


class Allocations(TorchDispatchMode):
    """Records the number of elements of every storage that an operation makes, forward and backward."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: list[Tensor] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self.seen.add(tensor.untyped_storage()._cdata)
                # Kept alive, so that no later storage takes the same address.
                self.alive.append(tensor)
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def make(dtype: torch.dtype, *, head_trains: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_(head_trains)
    return (
        hidden,
        weight,
        torch.randn(TOKENS, WIDTH, generator=generator),
        torch.randn(VOCABULARY, WIDTH, generator=generator),
    )


def run(inputs: tuple[Tensor, Tensor, Tensor, Tensor], **options: Any) -> list[int]:
    with Allocations(*inputs) as allocations:
        loss = flat_divergence(*inputs, chunk_size=CHUNK, **options)
        if loss.total.requires_grad:
            loss.total.sum().backward()
    return allocations.sizes


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "alpha", "total_variation"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary(divergence: str, reduction: str, dtype: torch.dtype) -> None:
    labels = torch.arange(TOKENS)
    options = {
        "divergence": divergence,
        "reduction": reduction,
        "labels": labels,
        "cross_entropy": 0.5,
        "temperature": 2.0,
    }
    sizes = run(make(dtype, head_trains=True), **options)
    largest_allowed = max(2 * CHUNK, WIDTH) * VOCABULARY
    assert max(sizes) <= largest_allowed < TOKENS * VOCABULARY


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("form", ["logits", "top_k"])
def test_other_forms_of_the_teacher_need_no_second_buffer(form: str, divergence: str) -> None:
    hidden, weight, _, _ = make(torch.float32, head_trains=True)
    logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    top = TeacherTopK.from_logits(logits, 5)
    teacher: dict[str, Any] = {"teacher_logits": logits} if form == "logits" else {"teacher_top_k": top}
    with Allocations(hidden, weight, logits, top.indices, top.log_probabilities) as allocations:
        loss = flat_divergence(hidden, weight, **teacher, divergence=divergence, chunk_size=40, temperature=2.0)
        loss.total.backward()
    # One chunk of logits, where a teacher with a head has a buffer of two.
    assert max(allocations.sizes) == 40 * VOCABULARY < TOKENS * VOCABULARY


def test_bfloat16_logits_take_half_the_memory() -> None:
    inputs = make(torch.float32, head_trains=False)
    sizes = []
    for logits_dtype in ("float32", "bfloat16"):
        with Allocations(*inputs) as allocations:
            flat_divergence(*inputs, chunk_size=CHUNK, logits_dtype=logits_dtype)
        sizes.append(max(tensor.untyped_storage().nbytes() for tensor in allocations.alive))
    assert sizes == [2 * CHUNK * VOCABULARY * 4, 2 * CHUNK * VOCABULARY * 2]


def test_the_watch_sees_the_dense_form() -> None:
    assert max(run(make(torch.float32, head_trains=True), impl="reference")) >= TOKENS * VOCABULARY


def test_a_mask_copies_no_hidden_states_beyond_a_chunk() -> None:
    mask = torch.arange(TOKENS) % 3 != 0
    sizes = run(make(torch.float32, head_trains=False), mask=mask)
    assert sizes.count(TOKENS * WIDTH) <= 1, "the gradient alone is of that size"


def test_a_frozen_head_has_no_gradient_buffer() -> None:
    """Both heads have VOCABULARY x WIDTH elements; nothing of that size is made. A chunk's pair of logits is as large,
    so a chunk of another size tells them apart."""
    inputs = make(torch.float32, head_trains=False)
    with Allocations(*inputs) as allocations:
        flat_divergence(*inputs, chunk_size=5).total.backward()
    assert VOCABULARY * WIDTH not in allocations.sizes
    with Allocations(*inputs) as allocations, torch.no_grad():
        inputs[1].requires_grad_()
        flat_divergence(*inputs, chunk_size=5)
    assert VOCABULARY * WIDTH not in allocations.sizes
    assert TOKENS * WIDTH not in allocations.sizes


def test_a_training_head_has_one_gradient_buffer() -> None:
    """The kept gradient is scaled in place and becomes the parameter's own: never in memory twice."""
    inputs = make(torch.float32, head_trains=True)
    with Allocations(*inputs) as allocations:
        (2 * flat_divergence(*inputs, chunk_size=5).total).backward()
        allocations.alive.clear()
    assert allocations.sizes.count(VOCABULARY * WIDTH) <= 2
    with Allocations(*inputs) as allocations:
        total = 2 * flat_divergence(*inputs, chunk_size=5).total
        made = allocations.sizes.count(VOCABULARY * WIDTH)
        torch.autograd.grad(total, [inputs[0], inputs[1]])
    assert made == allocations.sizes.count(VOCABULARY * WIDTH) == 1


@pytest.mark.parametrize("distance", ["mse", "relative_mse", "cosine", "normalised_mse"])
def test_no_projected_tensor(distance: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(200, WIDTH, generator=generator).requires_grad_()
    teacher = torch.randn(TOKENS, 200, generator=generator)
    for impl, small in (("streaming", True), ("reference", False)):
        with Allocations(student, weight, teacher) as allocations:
            projected_distance(
                student, teacher, weight=weight, distance=distance, impl=impl, chunk_size=CHUNK
            ).total.backward()
        assert (max(allocations.sizes) < TOKENS * 200) == small
