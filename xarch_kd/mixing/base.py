"""Base class of token-mixing matrices: application to values, blocks of entries, row sums."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

from xarch_kd.display import preformatted
from xarch_kd.errors import UsageError

# Entries, over all sequences and heads, above which `dense()` needs an explicit limit: 256 MiB in float32.
DENSE_LIMIT: Final = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Mixing(ABC):
    """Token-mixing matrices M, one per sequence and head, y = M v, stored as factors.

    `valid_range` [batch, 2] (int64) bounds the valid tokens of each sequence, start <= t < stop; None: all are valid.
    Entries whose row or column is not valid are 0, whatever the factors hold there.

    Factors keep their dtype and their graph: `apply`, `block`, `row_sums` and `dense` are differentiable.

    >>> import torch
    >>> from xarch_kd.mixing import SoftmaxMixing
    >>> mixing = SoftmaxMixing(query=torch.randn(1, 6, 4, 8), key=torch.randn(1, 6, 4, 8), scale=8**-0.5)
    >>> mixing
    SoftmaxMixing: batch 1, time 6, heads 4, float32 on cpu
      query [1, 6, 4, 8]
      key [1, 6, 4, 8]
    >>> mixing.apply(torch.ones(1, 6, 4, 3)).shape
    torch.Size([1, 6, 4, 3])
    """

    kind: ClassVar[str]

    valid_range: Tensor | None = None

    def __repr__(self) -> str:
        numbers = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        head = f"{type(self).__name__}: batch {self.batch}, time {self.time}, heads {self.heads}, {numbers}"
        lengths = () if self.valid_range is None else ("  only tokens in valid_range count",)
        factors = (f"  {name} {[*factor.shape]}" for name, factor in self.factors.items())
        return "\n".join([head, *factors, *lengths])

    def _repr_html_(self) -> str:
        return preformatted(repr(self))

    @property
    @abstractmethod
    def batch(self) -> int:
        """Number of sequences."""

    @property
    @abstractmethod
    def time(self) -> int:
        """Sequence length in tokens."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Number of matrices per sequence: attention heads, or channels if each channel has its own matrix."""

    @property
    @abstractmethod
    def factors(self) -> dict[str, Tensor]:
        """The floating-point factors of the matrix by field name, without those that are None."""

    def apply(self, values: Tensor) -> Tensor:
        """Return M v [batch, time, heads, dim] for values of that shape, in their dtype, without forming M.

        Raises UsageError if the values do not fit.
        """
        self._check_values(values)
        with torch.autocast(self.device.type, enabled=False):
            return self._zero_invalid(self._apply(self._zero_invalid(values))).to(values.dtype)

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Return the entries [batch, heads, rows, columns] of M, in the accumulation dtype of the factors.

        Raises UsageError for a slice with a step.
        """
        rows, columns = self._bounds(rows), self._bounds(columns)
        with torch.autocast(self.device.type, enabled=False):
            entries = self._block(rows, columns)
        if self.valid_range is None:
            return entries
        valid = self.valid_mask()
        return entries.masked_fill(~(valid[:, None, rows, None] & valid[:, None, None, columns]), 0)

    @abstractmethod
    def _apply(self, values: Tensor) -> Tensor:
        """Return M v for checked values that are 0 where tokens are not valid; those rows may hold anything finite."""

    @abstractmethod
    def _block(self, rows: slice, columns: slice) -> Tensor:
        """Return entries for slices with bounds inside the sequence; those that are not valid may hold anything."""

    def row_sums(self) -> Tensor:
        """Return Σ_j M_ij [batch, time, heads]."""
        ones = torch.ones(self.batch, self.time, self.heads, 1, dtype=self.dtype, device=self.device)
        return self.apply(ones).squeeze(-1)

    def dense(self, *, limit: int | None = DENSE_LIMIT) -> Tensor:
        """Return M [batch, heads, time, time], for tests and plots.

        Raises UsageError if it has more than `limit` entries (None: no limit).
        """
        entries = self.batch * self.heads * self.time**2
        if limit is not None and entries > limit:
            raise UsageError(
                "The dense matrix is too large to be built by default.",
                asked=f"{self.batch} sequences × {self.heads} heads × {self.time}² = {entries:,} entries",
                allowed=f"at most {limit:,}",
                fix="take block(rows, columns) of it, apply it to values, or pass limit=None",
            )
        everything = slice(0, self.time)
        return self.block(everything, everything)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: float64 if any factor is, else float32."""
        wide = any(factor.dtype == torch.float64 for factor in self.factors.values())
        return torch.float64 if wide else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return next(iter(self.factors.values())).device

    def valid_mask(self) -> Tensor:
        """Return the mask of valid tokens, bool [batch, time]."""
        if self.valid_range is None:
            return torch.ones(self.batch, self.time, dtype=torch.bool, device=self.device)
        position = torch.arange(self.time, device=self.device)
        return (position >= self.valid_range[:, :1]) & (position < self.valid_range[:, 1:])

    def map_factors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the same mixing with `function` applied to each factor, e.g. `torch.Tensor.detach`."""
        return dataclasses.replace(self, **{name: function(factor) for name, factor in self.factors.items()})

    def detach(self) -> Self:
        """Return the same mixing without the graph of its factors."""
        return self.map_factors(torch.Tensor.detach)

    def _zero_invalid(self, tensor: Tensor) -> Tensor:
        """Return tensor [batch, time, ...] with 0 at tokens that are not valid."""
        if self.valid_range is None:
            return tensor
        return tensor.masked_fill(~self.valid_mask().view(self.batch, self.time, *[1] * (tensor.dim() - 2)), 0)

    def _bounds(self, part: slice) -> slice:
        start, stop, step = part.indices(self.time)
        if step != 1:
            raise UsageError(
                "A block of a mixing matrix has contiguous rows and columns.", asked=part, allowed="step 1"
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
            raise UsageError("Values must be floating point.", found=values.dtype)
        if values.device != self.device:
            raise UsageError("Values and factors must be on one device.", found=values.device, allowed=self.device)
