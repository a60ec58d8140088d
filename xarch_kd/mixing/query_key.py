"""What mixings have in common whose sizes are those of their queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xarch_kd.mixing.base import Mixing


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryKeyMixing(Mixing):
    """A mixing of queries [batch, time, heads, dim] and keys, whose heads may be fewer where a class says so."""

    query: Tensor
    key: Tensor

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.query.shape[0]

    @property
    def time(self) -> int:
        """How many tokens a sequence has."""
        return self.query.shape[1]

    @property
    def heads(self) -> int:
        """How many query heads."""
        return self.query.shape[2]
