"""Base class of mixings with queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xarch_kd.mixing.base import Mixing


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QueryKeyMixing(Mixing):
    """Mixing with queries [batch, time, heads, dim] and keys, which have fewer heads in some subclasses."""

    query: Tensor
    key: Tensor

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.query.shape[0]

    @property
    def time(self) -> int:
        """Sequence length in tokens."""
        return self.query.shape[1]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[2]
