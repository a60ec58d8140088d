"""What every token-mixing matrix can do: apply itself to values, give a block of its entries, sum its rows."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

from xarch_kd.errors import UsageError

# Entries of a dense map, all sequences and heads, above which `dense()` must be asked for twice: 256 MiB of float32.
DENSE_LIMIT: Final = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixing(ABC):
    """A causal token-mixing matrix M of each sequence and head, y = M v, held as the factors it is made of.

    `start` and `stop` [batch] (int64) bound the tokens of each sequence that count, start <= t < stop; None means 0 and
    the whole length. Every entry whose row or column does not count is 0, whatever the factors hold there.

    Factors keep their dtype and their graph: gradients flow from all four verbs to them.
    """

    kind: ClassVar[str]

    start: Tensor | None = None
    stop: Tensor | None = None

    @property
    @abstractmethod
    def batch(self) -> int:
        """How many sequences."""

    @property
    @abstractmethod
    def time(self) -> int:
        """How many tokens a sequence has."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """How many matrices a sequence has: attention heads, or channels where each channel mixes by itself."""

    @property
    @abstractmethod
    def factors(self) -> dict[str, Tensor]:
        """The floating point tensors that the matrix is made of, by field name; those that are None are left out."""

    def apply(self, values: Tensor) -> Tensor:
        """Return M v [batch, time, heads, dim] for values of that shape, in their dtype, without forming M.

        Raises UsageError when the values do not fit.
        """
        self._check_values(values)
        with torch.autocast(self.device.type, enabled=False):
            return self._kept(self._apply(self._kept(values))).to(values.dtype)

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Return the entries [batch, heads, rows, columns] of M, in the accumulation dtype of the factors.

        Raises UsageError for a slice with a step.
        """
        rows, columns = self._bounds(rows), self._bounds(columns)
        with torch.autocast(self.device.type, enabled=False):
            entries = self._block(rows, columns)
        if self.start is None and self.stop is None:
            return entries
        counted = self.counted()
        return entries.masked_fill(~(counted[:, None, rows, None] & counted[:, None, None, columns]), 0)

    @abstractmethod
    def _apply(self, values: Tensor) -> Tensor:
        """Return M v for checked values that are 0 where tokens do not count; those rows may hold anything finite."""

    @abstractmethod
    def _block(self, rows: slice, columns: slice) -> Tensor:
        """Return entries for slices with bounds inside the sequence; those that do not count may hold anything."""

    def row_sums(self) -> Tensor:
        """Return Σ_j M_ij [batch, time, heads]."""
        ones = torch.ones(self.batch, self.time, self.heads, 1, dtype=self.dtype, device=self.device)
        return self.apply(ones).squeeze(-1)

    def dense(self, *, limit: int | None = DENSE_LIMIT) -> Tensor:
        """Return M [batch, heads, time, time], for tests and plots.

        Raises UsageError when it has more than `limit` entries (None: no limit).
        """
        entries = self.batch * self.heads * self.time**2
        if limit is not None and entries > limit:
            raise UsageError(
                "The dense matrix is too large to be made without being asked for.",
                asked=f"{self.batch} sequences × {self.heads} heads × {self.time}² = {entries:,} entries",
                allowed=f"at most {limit:,}",
                fix="take block(rows, columns) of it, apply it to values, or pass limit=None",
            )
        everything = slice(0, self.time)
        return self.block(everything, everything)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that entries are computed in: float64 when any factor is, else float32."""
        wide = any(factor.dtype == torch.float64 for factor in self.factors.values())
        return torch.float64 if wide else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next(iter(self.factors.values())).device

    def counted(self) -> Tensor:
        """Return which tokens count, bool [batch, time]."""
        position = torch.arange(self.time, device=self.device)
        counted = torch.ones(self.batch, self.time, dtype=torch.bool, device=self.device)
        if self.start is not None:
            counted &= position >= self.start[:, None]
        if self.stop is not None:
            counted &= position < self.stop[:, None]
        return counted

    def map_factors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the same mixing with `function` applied to each factor, e.g. `torch.Tensor.detach`."""
        return dataclasses.replace(self, **{name: function(factor) for name, factor in self.factors.items()})

    def detach(self) -> Self:
        """Return the same mixing without the graph of its factors."""
        return self.map_factors(torch.Tensor.detach)

    def _kept(self, tensor: Tensor) -> Tensor:
        """Return tensor [batch, time, ...] with 0 at tokens that do not count."""
        if self.start is None and self.stop is None:
            return tensor
        return tensor.masked_fill(~self.counted().view(self.batch, self.time, *[1] * (tensor.dim() - 2)), 0)

    def _bounds(self, part: slice) -> slice:
        start, stop, step = part.indices(self.time)
        if step != 1:
            raise UsageError(
                "A block of a mixing matrix has neighbouring rows and columns.", asked=part, allowed="step 1"
            )
        return slice(start, max(start, stop))

    def _check_values(self, values: Tensor) -> None:
        expected = (self.batch, self.time, self.heads)
        if values.dim() != 4 or values.shape[:3] != expected:
            raise UsageError(
                f"The values do not fit the {self.kind} mixing.",
                found=list(values.shape),
                allowed=f"[batch, time, heads, dim] = {[*expected, 'dim']}",
            )
        if not values.is_floating_point():
            raise UsageError("Values are floating point numbers.", found=values.dtype)
        if values.device != self.device:
            raise UsageError("Values and factors are on one device.", found=values.device, allowed=self.device)
