"""No tensor of tokens by tokens exists while `mixing_distance` runs, forward or backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xarch_kd.mixing import DeltaMixing, LinearMixing, Mixing, SoftmaxMixing, SSDMixing, row_softmax
from xarch_kd.ops import mixing_distance

TOKENS, HEADS, WIDTH, CHUNK = 257, 2, 4, 8


class LargestStorage(TorchDispatchMode):
    """Records the number of elements of the largest storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(1, TOKENS, *shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, seed: int) -> Mixing:
    query, key = normal(seed, HEADS, WIDTH).requires_grad_(), normal(seed + 1, HEADS, WIDTH).requires_grad_()
    numbers = normal(seed + 2, HEADS).abs()
    if kind == "softmax":
        return SoftmaxMixing(query=query, key=key, scale=0.5)
    if kind == "ssd":
        return SSDMixing(C=query, B=key, log_decay=-numbers, dt=numbers.requires_grad_())
    if kind == "linear":
        return LinearMixing(query=query, key=key, log_decay=-numbers.requires_grad_())
    key = torch.nn.functional.normalize(key.detach(), dim=-1).requires_grad_()
    return DeltaMixing(query=query, key=key, beta=numbers.sigmoid().requires_grad_())


def largest(impl: str, distance: Any, teacher: Mixing, student: Mixing, reduction: str) -> int:
    with LargestStorage() as watched:
        found = mixing_distance(
            student,
            teacher,
            distance=distance,
            head_map=torch.full((HEADS, HEADS), 1 / HEADS),
            mask=torch.arange(TOKENS)[None] % 5 > 0,
            reduction=reduction,
            impl=impl,
            chunk_size=CHUNK,
            probes=2 * CHUNK,
        )
        found.total.sum().backward()
    return watched.elements


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let softmax attention be applied by few rows, as it is where the whole map does not fit its blocks."""
    monkeypatch.setattr(row_softmax, "BLOCK_ELEMENTS", {"cpu": CHUNK * HEADS * TOKENS})


@pytest.mark.parametrize(
    ("impl", "distance", "teacher", "student"),
    [
        ("streaming", "kl", "softmax", "softmax"),
        ("streaming", "cross_entropy", "softmax", "softmax"),
        ("streaming", "cosine", "softmax", "softmax"),
        ("streaming", "frobenius", "softmax", "ssd"),
        ("streaming", "cosine", "ssd", "ssd"),
        ("streaming", "relative_frobenius", "softmax", "linear"),
        ("panels", "cosine", "softmax", "delta"),
        ("panels", "frobenius", "ssd", "ssd"),
        ("sketch", "frobenius", "softmax", "ssd"),
        ("sketch", "frobenius", "softmax", "delta"),
    ],
)
def test_no_tensor_of_tokens_by_tokens(impl: str, distance: Any, teacher: str, student: str) -> None:
    assert largest(impl, distance, make(teacher, 0), make(student, 10), "none") < TOKENS**2


@pytest.mark.parametrize("impl", ["streaming", "panels", "sketch"])
def test_nor_for_a_mean(impl: str) -> None:
    assert largest(impl, "frobenius", make("softmax", 0), make("ssd", 10), "mean") < TOKENS**2


def test_the_watch_sees_the_dense_form() -> None:
    assert largest("reference", "cosine", make("softmax", 0), make("ssd", 10), "mean") >= HEADS * TOKENS**2
