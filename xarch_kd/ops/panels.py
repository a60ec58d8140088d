"""`mixing_distance` by panels of columns: each mixer applied to columns of the identity, with its own gradient.

It is exact for every mixer that can be applied, and holds tokens × panel numbers per head. A distance whose slope needs
the whole row takes two rounds: the numbers of each row, then the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from xarch_kd.mixing import Mixing, SoftmaxMixing
from xarch_kd.ops.mixing_inputs import MixingDistanceInputs
from xarch_kd.ops.row_distances import EntryFormula, LogarithmFormula, RowStatistics

COLUMNS: Final = 64


@dataclass
class ForwardBackward:
    """The distance of each row [batch, time, student heads], and the gradients that were wanted by factor."""

    values: Tensor
    gradients: dict[str, Tensor]


def unsupported_reason(formula: EntryFormula | LogarithmFormula) -> str | None:
    """Return why panels cannot give this distance, or None when they can."""
    if isinstance(formula, EntryFormula):
        return None
    return f"panels hold entries, not their logarithms, and {formula.name} of an entry that underflows is infinite"


@torch.no_grad()
def forward_backward(
    inputs: MixingDistanceInputs, weights: Tensor, wanted: frozenset[str], chunk_size: int | None
) -> ForwardBackward:
    """Go over the columns once, and once more for the gradients of the `wanted` factors.

    `weights` [batch, time, student heads or 1] multiply each row's part in the gradients and are 0 where a row does not
    count.
    """
    with torch.autocast(weights.device.type, enabled=False):
        width = chunk_size or COLUMNS
        student, teacher, formula = inputs.student.detach(), _Target(inputs), inputs.formula
        assert isinstance(formula, EntryFormula)
        totals: RowStatistics | None = None
        for columns, identity in _identity_panels(inputs, width):
            entries = _student_panel(student, identity)
            statistics, _ = formula.measure(entries, teacher.panel(columns, identity))
            totals = statistics if totals is None else _added(totals, statistics)
        assert totals is not None
        values = torch.where(inputs.valid_mask[:, :, None], formula.values(totals, inputs.epsilon), 0)
        if not wanted:
            return ForwardBackward(values, {})
        slopes = formula.slopes(totals, inputs.epsilon)
        return ForwardBackward(values, _gradients(inputs, teacher, slopes, weights, wanted, width))


def leaves(student: Mixing, wanted: frozenset[str]) -> tuple[Mixing, dict[str, Tensor]]:
    """Return the mixing with factors cut from their graph, and those of them whose gradient is wanted, by name."""
    cut = {name: factor.detach().requires_grad_(name in wanted) for name, factor in student.factors.items()}
    return replace(student, **cut), {name: factor for name, factor in cut.items() if name in wanted}


def mixed_target(inputs: MixingDistanceInputs, values: Tensor) -> Tensor:
    """Return (head_map @ teacher) applied to values [batch, time, 1, width], the same for every head."""
    return _mixed(inputs, inputs.teacher.apply(values.expand(-1, -1, inputs.teacher.heads, -1)))


class _Target:
    """Panels of head_map @ teacher. Those of a softmax take its normalizers once, instead of a whole row per panel."""

    def __init__(self, inputs: MixingDistanceInputs) -> None:
        self.inputs = inputs
        self.normalizer: Tensor | None = None
        if isinstance(inputs.teacher, SoftmaxMixing):
            self.normalizer = inputs.teacher.log_normalizer(slice(0, inputs.teacher.time))

    def panel(self, columns: slice, identity: Tensor) -> Tensor:
        """Return the columns [batch, time, student heads, width]; whoever gets them may write over them."""
        teacher = self.inputs.teacher
        if self.normalizer is None:
            return mixed_target(self.inputs, identity)
        assert isinstance(teacher, SoftmaxMixing)
        logits = teacher.logits(slice(0, teacher.time), columns)
        return _mixed(self.inputs, logits.sub_(self.normalizer[..., None]).exp_().transpose(1, 2))


def _mixed(inputs: MixingDistanceInputs, panel: Tensor) -> Tensor:
    panel = panel.to(inputs.dtype)
    return panel if inputs.head_map is None else torch.einsum("st,bitp->bisp", inputs.head_map, panel)


def _student_panel(student: Mixing, values: Tensor) -> Tensor:
    return student.apply(values.expand(-1, -1, student.heads, -1))


def _gradients(
    inputs: MixingDistanceInputs,
    teacher: _Target,
    slopes: tuple[Tensor | float, Tensor | None],
    weights: Tensor,
    wanted: frozenset[str],
    width: int,
) -> dict[str, Tensor]:
    factor, share = slopes
    row = (weights * factor)[..., None]
    student, factors = leaves(inputs.student, wanted)
    gradients = {name: torch.zeros_like(leaf, dtype=inputs.dtype) for name, leaf in factors.items()}
    for columns, identity in _identity_panels(inputs, width):
        with torch.enable_grad():
            entries = _student_panel(student, identity)
        seen = entries.detach().to(inputs.dtype)
        slope = teacher.panel(columns, identity).sub_(seen if share is None else seen * share[..., None]).mul_(row)
        parts = torch.autograd.grad(entries, list(factors.values()), slope.to(entries.dtype), allow_unused=True)
        for name, part in zip(factors, parts, strict=True):
            if part is not None:
                gradients[name] += part
    return gradients


def _identity_panels(inputs: MixingDistanceInputs, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Return panels of columns, and those of the identity [batch, time, 1, width]."""
    student = inputs.student
    for start in range(0, student.time, width):
        panel = torch.zeros(student.time, min(width, student.time - start), dtype=inputs.dtype, device=student.device)
        panel[start : start + width].fill_diagonal_(1)
        yield slice(start, start + panel.shape[1]), panel[None, :, None, :].expand(student.batch, -1, -1, -1)


def _added(first: RowStatistics, second: RowStatistics) -> RowStatistics:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return RowStatistics(*(None if one is None else one + other for one, other in pairs))
