"""Layer similarity of both models before training, for layer maps that depend on data.

Debiased CKA of every student layer with every teacher layer. Tokens of one sequence depend on each other, so a batch is
the same position of many sequences; a few dimensions of a residual stream can outweigh all others, so each dimension is
standardized over all tokens first; first tokens, whose activations are massive, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from xarch_kd.data.rows import select_rows
from xarch_kd.errors import DataError
from xarch_kd.ops.similarity import LayerSimilarity
from xarch_kd.planning.layer_maps import entry_key
from xarch_kd.planning.plan import Plan
from xarch_kd.run.report import Reporter, Work
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.trace import trace

# Sequences below which the same position of all of them is no batch, and positions that are kept of each.
FEWEST_ROWS: Final = 8
POSITIONS: Final = 32
FIRST_TOKENS: Final = 4
SMALLEST_DEVIATION: Final = 1e-6
# A pass holds what all layers give on its tokens; on a CPU more of them at a time are slower, not faster.
TOKENS_AT_A_TIME: Final = 1024


def measure_similarities(
    plan: Plan, teacher: Layout, student: Layout, rows: Tensor, *, reporter: Reporter | None = None
) -> dict[str, Tensor]:
    """Return CKA [student layers, teacher layers], float64 on the CPU, for each entry of `plan.uncalibrated`, by key.

    `rows` [rows, time] are training text, of which about `calibration.tokens` tokens are read, in the order that the
    seed gives. Raises DataError when there is too little of it.
    """
    chosen = chosen_rows(plan, rows)
    entries = {
        (stage, name): next(entry for entry in plan.mapping.stages[stage].align if entry.name == name)
        for stage, name in plan.uncalibrated
    }
    taps = dict.fromkeys(entry.tap for entry in entries.values())
    tokens = 2 * len(taps) * chosen.numel()
    with (reporter or Reporter.silent()).work("calibrating layer maps", tokens, "tokens") as work:
        by_tap = {tap: layer_similarity(tap, teacher, student, chosen, work) for tap in taps}
    return {entry_key(stage, name): by_tap[entry.tap] for (stage, name), entry in entries.items()}


def chosen_rows(plan: Plan, rows: Tensor) -> Tensor:
    """Return the rows that are read: about `calibration.tokens` tokens, at least FEWEST_ROWS rows."""
    count = max(FEWEST_ROWS, math.ceil(plan.mapping.calibration.tokens / rows.shape[1]))
    if rows.shape[0] < FEWEST_ROWS:
        raise DataError(
            "There is too little text to compare layers on.",
            found=f"{rows.shape[0]} rows of {rows.shape[1]} tokens",
            allowed=f"at least {FEWEST_ROWS} rows",
            fix="give more text or a smaller data.sequence_length, or use a strategy that needs no calibration",
        )
    return select_rows(rows, count, seed=plan.mapping.seed)


@torch.no_grad()
def layer_similarity(tap: str, teacher: Layout, student: Layout, rows: Tensor, work: Work | None = None) -> Tensor:
    """Return the debiased CKA [student layers, teacher layers] of a tap over rows of token ids [rows, time].

    Tokens are counted in `work`, once per model.
    """
    time = rows.shape[1]
    positions = torch.linspace(min(FIRST_TOKENS, time - 1), time - 1, min(POSITIONS, time)).long().unique()
    ours, theirs = (_features(layout, tap, rows, positions, work) for layout in (student, teacher))
    sums = LayerSimilarity()
    for position in range(len(positions)):
        sums.update([layer[:, position] for layer in ours], [layer[:, position] for layer in theirs])
    return sums.result().total.cpu().double()


def _features(layout: Layout, tap: str, rows: Tensor, positions: Tensor, work: Work | None) -> Sequence[Tensor]:
    """Return what each layer gives at the positions of every row, standardized: [rows, positions, dim] a layer."""
    was_training = layout.model.training
    layout.model.eval()
    kept: list[list[Tensor]] = [[] for _ in layout.blocks]
    device = next(layout.model.parameters()).device
    size = max(1, TOKENS_AT_A_TIME // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        traced = trace(layout, rows[start : start + size].to(device), taps=[tap])[tap]
        for layer, features in traced.items():
            kept[layer].append(features[:, positions.to(device)].float())
        if work is not None:
            work.advance(rows[start : start + size].numel())
    layout.model.train(was_training)
    return [_standardized(torch.cat(parts)) for parts in kept]


def _standardized(features: Tensor) -> Tensor:
    mean, deviation = features.mean((0, 1)), features.std((0, 1))
    return (features - mean) / deviation.clamp(min=SMALLEST_DEVIATION)
