"""`mixing_distance` by blocks of rows: a block reaches no further than its rows see, and is the largest tensor.

The gradients of softmax and state-space dual students are written out (`softmax_rows`, `ssd_rows`); other students are
differentiated by autograd one block at a time (`block_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from xarch_kd.mixing import (
    BandedMixing,
    LinearMixing,
    Mixing,
    SelectiveMixing,
    SoftmaxMixing,
    SSDMixing,
)
from xarch_kd.ops.mixing_inputs import MixingDistanceInputs
from xarch_kd.ops.row_distances import EntryFormula, LogarithmFormula
from xarch_kd.ops.streaming.block_rows import BlockRows
from xarch_kd.ops.streaming.softmax_rows import SoftmaxRows
from xarch_kd.ops.streaming.ssd_rows import SSDRows

RowSource = SoftmaxRows | SSDRows | BlockRows
ROWS: Final = {"cpu": 64, "other": 256}
LEAST_ROWS: Final = 8
# Entries of one block above which it gets fewer rows: 32 MiB of float32, or 512.
BLOCK_ELEMENTS: Final = {"cpu": 8 << 20, "other": 128 << 20}
# Students whose block, and its graph, need memory for its own rows × (columns + width) alone: autograd on one block at
# a time is exact and linear in the tokens.
BY_AUTOGRAD: Final = (LinearMixing, SelectiveMixing, BandedMixing)


@dataclass
class ForwardBackward:
    """The distance of each row [batch, time, student heads], and the gradients that were wanted by factor."""

    values: Tensor
    gradients: dict[str, Tensor]


def unsupported_reason(student: Mixing) -> str | None:
    """Return why row blocks cannot be differentiated in linear memory for this student, or None when they can."""
    if isinstance(student, (SoftmaxMixing, SSDMixing, *BY_AUTOGRAD)):
        return None
    return f"rows of a {student.kind} mixing are not made by themselves; impl='panels' is exact too"


def default_chunk(inputs: MixingDistanceInputs) -> int:
    """Return the number of rows per block."""
    device = "cpu" if inputs.valid_mask.device.type == "cpu" else "other"
    heads = max(inputs.student.heads, inputs.teacher.heads)
    fitting = BLOCK_ELEMENTS[device] // (inputs.student.batch * heads * inputs.student.time)
    return max(LEAST_ROWS, min(ROWS[device], fitting))


def source(mixing: Mixing, dtype: torch.dtype, wanted: frozenset[str] = frozenset()) -> RowSource:
    """Return what makes the row blocks of a mixing, and sums the gradients of the wanted factors."""
    if isinstance(mixing, SoftmaxMixing):
        return SoftmaxRows(mixing, dtype, wanted)
    if isinstance(mixing, SSDMixing):
        return SSDRows(mixing, dtype, wanted)
    return BlockRows(mixing, dtype, wanted)


@torch.no_grad()
def forward_backward(
    inputs: MixingDistanceInputs, weights: Tensor, wanted: frozenset[str], chunk_size: int | None
) -> ForwardBackward:
    """Go over the rows that count once.

    `weights` [batch, time, student heads or 1] multiply each row's part in the gradients of the `wanted` factors and
    are 0 where a row does not count.
    """
    values = weights.new_zeros(inputs.student.batch, inputs.student.time, inputs.student.heads)
    with torch.autocast(values.device.type, enabled=False):
        student = source(inputs.student, inputs.dtype, wanted)
        teacher = source(inputs.teacher, inputs.dtype)
        for rows in _blocks(inputs.valid_mask, chunk_size or default_chunk(inputs)):
            weight = weights[:, rows].transpose(1, 2).expand(-1, values.shape[2], -1)
            ends = [side.columns(rows) for side in (student, teacher)]
            columns = slice(min(end.start for end in ends), max(end.stop for end in ends))
            step = _logarithms if isinstance(inputs.formula, LogarithmFormula) else _statistics
            found = step(inputs, student, teacher, rows, columns, weight if wanted else None)
            values[:, rows] = torch.where(inputs.valid_mask[:, rows, None], found.transpose(1, 2), 0)
        return ForwardBackward(values, student.finish() if wanted else {})


def _blocks(valid_mask: Tensor, chunk: int) -> Iterator[slice]:
    """Return the blocks from the first to the last row that is valid in any sequence; on a device, all blocks.

    Reading which rows are valid would wait for the device; blocks without such a row are multiplied by 0.
    """
    first, end = 0, valid_mask.shape[1]
    if valid_mask.device.type == "cpu":
        rows = valid_mask.any(0).nonzero()
        if not rows.numel():
            return
        first, end = int(rows[0]), int(rows[-1]) + 1
    for start in range(first, end, chunk):
        yield slice(start, min(start + chunk, end))


def _statistics(
    inputs: MixingDistanceInputs,
    student: RowSource,
    teacher: RowSource,
    rows: slice,
    columns: slice,
    weight: Tensor | None,
) -> Tensor:
    """Return the distance of each row [batch, heads, rows] and give the student the block's gradient."""
    formula = inputs.formula
    assert isinstance(formula, EntryFormula)
    target = inputs.mixed(teacher.matrix(rows, columns))
    entries = student.matrix(rows, columns)
    statistics, difference = formula.measure(entries, target)
    values = formula.values(statistics, inputs.epsilon)
    if weight is not None:
        factor, share = formula.slopes(statistics, inputs.epsilon)
        slope = target.addcmul_(entries, share[..., None], value=-1) if share is not None else difference
        assert slope is not None
        student.backward(slope, entries, weight * factor, rows, columns)
    return values


def _logarithms(
    inputs: MixingDistanceInputs,
    student: RowSource,
    teacher: RowSource,
    rows: slice,
    columns: slice,
    weight: Tensor | None,
) -> Tensor:
    """Return Σ P (log P - log M) or -Σ P log M of each row, and give the student the gradient of the block's logits."""
    formula = inputs.formula
    assert isinstance(formula, LogarithmFormula)
    assert isinstance(teacher, SoftmaxRows) and isinstance(student, SoftmaxRows)
    teacher_logits, logits = teacher.logits(rows, columns), student.logits(rows, columns)
    target, entries = teacher.probabilities(teacher_logits), student.probabilities(logits)
    normalizer = student.log_normalizer(logits, entries)
    one_to_one = formula.with_entropy and inputs.head_map is None
    total = torch.ones_like(normalizer)
    if one_to_one:
        # As Σ P = 1, this is Σ P (log P - log M) without a logarithm of each entry.
        normalizer = normalizer - teacher.log_normalizer(teacher_logits, target)
        values = normalizer + teacher_logits.sub_(logits).mul_(target).sum(-1)
    else:
        target = inputs.mixed(target)
        total = target.sum(-1)
        values = total * normalizer - (target * logits).sum(-1)
        if formula.with_entropy:
            values += torch.xlogy(target, target).sum(-1)
    if weight is not None:
        slope = entries if one_to_one else entries.mul_(total[..., None])
        student.logits_backward(slope.sub_(target), total, weight, rows, columns)
    return values
