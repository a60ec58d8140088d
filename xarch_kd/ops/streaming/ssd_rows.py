"""Row blocks of a state-space dual mixing, and the gradients of its factors from a block's gradient.

Left of a block's first row s every entry is G_ij r_i u_j, with G = C Bᵀ of the group, r_i the decay from s - 1 to i and
u_j the decay from j to s - 1 times dt_j: no exponential per entry, and no exponent above 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from xarch_kd.mixing import SSDMixing


@dataclass(frozen=True)
class _Tape:
    """Saved tensors of a block's forward pass: decays [batch, groups, heads of a group, ...]."""

    products: Tensor
    row: Tensor
    column: Tensor
    tile: Tensor


class SSDRows:
    """Blocks [batch, heads, rows, columns] of an SSD mixing, and the sums of its factors' gradients over blocks.

    Rows that do not count hold numbers without meaning: their weight must be 0.
    """

    def __init__(self, mixing: SSDMixing, dtype: torch.dtype, wanted: frozenset[str] = frozenset()) -> None:
        self.mixing, self.dtype = mixing, dtype
        factors = {name: factor.detach() for name, factor in mixing.factors.items()}
        if mixing.valid_range is not None:
            valid = mixing.valid_mask()
            for name in ("C", "B", "log_decay", "dt"):
                factors[name] = factors[name].masked_fill(
                    ~valid.view(*valid.shape, *[1] * (factors[name].dim() - 2)), 0
                )
        # [batch, groups, time, state] and [batch, groups, heads of a group, time].
        self.c, self.b = (factors[name].to(dtype).transpose(1, 2).contiguous() for name in ("C", "B"))
        groups = self.c.shape[1]
        self.dt = factors["dt"].to(dtype).transpose(1, 2).unflatten(1, (groups, -1)).contiguous()
        # Differences of sums over a whole sequence lose their digits in float32.
        self.decay = factors["log_decay"].double().transpose(1, 2).cumsum(-1).unflatten(1, (groups, -1))
        self.skip = None if mixing.D is None else factors["D"].to(dtype)
        self.wanted = wanted
        self._sums = (
            {
                "C": torch.zeros_like(self.c),
                "B": torch.zeros_like(self.b),
                "dt": torch.zeros_like(self.dt),
                "log_decay": torch.zeros_like(self.decay),
                "D": torch.zeros(mixing.heads, dtype=torch.float64, device=self.c.device),
            }
            if wanted
            else {}
        )
        self._tape: _Tape | None = None

    def columns(self, rows: slice) -> slice:
        """Return the columns that any of the rows may see."""
        return slice(0, rows.stop)

    def matrix(self, rows: slice, columns: slice) -> Tensor:
        """Return the entries of a block."""
        first, left = columns.start, slice(columns.start, rows.start)
        products = (self.c[:, :, rows] @ self.b[:, :, first : rows.stop].transpose(-1, -2))[:, :, None]
        decay = self.decay[..., rows]
        before = self.decay[..., rows.start - 1, None] if rows.start else torch.zeros_like(decay[..., :1])
        row = (decay - before).to(self.dtype).exp_()[..., None]
        column = ((before - self.decay[..., left]).to(self.dtype).exp_() * self.dt[..., left])[..., None, :]
        tile = _lower_triangle(decay).to(self.dtype).exp_()
        self._tape = _Tape(products, row, column, tile)
        split = rows.start - first
        entries = products.new_empty(*self.dt.shape[:3], *products.shape[-2:])
        torch.mul(products[..., :split], row, out=entries[..., :split]).mul_(column)
        torch.mul(products[..., split:], tile, out=entries[..., split:]).mul_(self.dt[..., None, rows])
        entries = entries.flatten(1, 2)
        if self.skip is not None:
            entries[..., split:].diagonal(dim1=-2, dim2=-1).add_(self.skip[:, None])
        return entries if columns.stop == rows.stop else pad(entries, (0, columns.stop - rows.stop))

    def backward(self, slope: Tensor, matrix: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradients from weight[..., None] × slope, the gradient of the block's entries; it is overwritten."""
        tape, self._tape = self._tape, None
        assert tape is not None
        slope = slope[..., : rows.stop - columns.start].unflatten(1, self.dt.shape[1:3])
        weight = weight.unflatten(1, self.dt.shape[1:3])[..., None]
        split, left = rows.start - columns.start, slice(columns.start, rows.start)
        if "D" in self.wanted:
            diagonal = slope[..., split:].diagonal(dim1=-2, dim2=-1) * weight[..., 0]
            self._sums["D"] += diagonal.sum((0, -1)).flatten()
        if self.wanted & {"dt", "log_decay"}:
            self._decays_backward(slope * tape.products, weight, tape, rows, left)
        if not self.wanted & {"C", "B"}:
            return
        slope[..., :split].mul_(tape.row * weight).mul_(tape.column)
        slope[..., split:].mul_(tape.tile * weight * self.dt[..., None, rows])
        # The heads of a group share C and B: they are added up before the products.
        shared = slope.sum(2)
        seen = slice(columns.start, rows.stop)
        self._sums["C"][:, :, rows] += shared @ self.b[:, :, seen]
        self._sums["B"][:, :, seen] += shared.transpose(-1, -2) @ self.c[:, :, rows]

    def _decays_backward(self, slope: Tensor, weight: Tensor, tape: _Tape, rows: slice, left: slice) -> None:
        """Add what the decays and dt get; `slope` is that of the decays times dt."""
        split = left.stop - left.start
        dt, decay = self._sums["dt"], self._sums["log_decay"]
        outer, tile = slope[..., :split], slope[..., split:] * (tape.tile * weight)
        row = tape.row * weight
        decay[..., rows] += (row * (outer @ tape.column.transpose(-1, -2))).squeeze(-1)
        through = (row.transpose(-1, -2) @ outer).squeeze(-2)
        decay[..., left] -= through * tape.column.squeeze(-2)
        before = self.decay[..., rows.start - 1, None] if rows.start else self.decay[..., :1]
        dt[..., left] += through * (before - self.decay[..., left]).to(self.dtype).exp_()
        dt[..., rows] += tile.sum(-2)
        tile.mul_(self.dt[..., None, rows])
        # An entry of the diagonal does not decay.
        tile.diagonal(dim1=-2, dim2=-1).zero_()
        decay[..., rows] += tile.sum(-1)
        decay[..., rows] -= tile.sum(-2)

    def finish(self) -> dict[str, Tensor]:
        """Return the gradients by the factors' names, in the layout of the factors."""
        sums = self._sums
        # The sum of the decays at i holds every step up to i.
        steps = sums["log_decay"].flip(-1).cumsum(-1).flip(-1).flatten(1, 2).transpose(1, 2)
        results = {
            "C": sums["C"].transpose(1, 2),
            "B": sums["B"].transpose(1, 2),
            "dt": sums["dt"].flatten(1, 2).transpose(1, 2),
            "log_decay": steps.masked_fill(~self.mixing.valid_mask()[:, :, None], 0),
            "D": sums["D"],
        }
        return {name: results[name].to(self.dtype) for name in results if name in self.wanted}


def _lower_triangle(decay: Tensor) -> Tensor:
    """Return c_i - c_j [..., rows, rows] where j <= i and -inf elsewhere, whose exponential would overflow."""
    difference = decay[..., :, None] - decay[..., None, :]
    above = torch.ones(difference.shape[-2:], dtype=torch.bool, device=decay.device).triu(1)
    return difference.masked_fill_(above, float("-inf"))
