"""Sizes of all tensors that PyTorch creates while code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationWatch(TorchDispatchMode):
    """Context that records (operation, shape) of every result for which `is_too_large` is true.

    Views count too: a view of a large tensor, e.g. an expanded mask, would be a large tensor if copied.
    """

    def __init__(self, is_too_large: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.is_too_large = is_too_large
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and check its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.seen += 1
                if self.is_too_large(leaf.shape):
                    self.found.append((str(func), tuple(leaf.shape)))
        return result


def square_or_vocabulary(time: int, vocabulary: int, tokens: int) -> Callable[[torch.Size], bool]:
    """Return a predicate for tensors of size time × time, as two axes or flattened, or tokens × vocabulary."""

    def is_too_large(shape: torch.Size) -> bool:
        numbers = shape.numel()
        long_axes = sum(size >= time for size in shape)
        flattened = numbers >= time * time and numbers % (time * time) == 0
        return long_axes >= 2 or flattened or numbers >= tokens * vocabulary

    return is_too_large
