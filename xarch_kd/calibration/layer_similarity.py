"""Layer similarity of both models before training, for layer maps that depend on data.

Debiased CKA of every student layer with every teacher layer. Tokens of one sequence depend on each other, so a batch is
the same position of many sequences; a few dimensions of a residual stream can outweigh all others, so each dimension is
standardized over all tokens first; first tokens, whose activations are massive, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import Rows, rows_of_tokens, select_rows
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
    plan: Plan, teacher: Layout, student: Layout, rows: Rows, *, reporter: Reporter | None = None
) -> dict[str, Tensor]:
    """Return CKA [student layers, teacher layers], float64 on the CPU, for each entry of `plan.uncalibrated`, by key.

    `rows` are training text, of which about `calibration.tokens` tokens are read, in the order that the seed gives.
    Raises DataError when there is too little of it.
    """
    batches = chosen_batches(plan, rows)
    entries = {
        (stage, name): next(entry for entry in plan.mapping.stages[stage].align if entry.name == name)
        for stage, name in plan.uncalibrated
    }
    taps = dict.fromkeys(entry.tap for entry in entries.values())
    tokens = 2 * len(taps) * sum(batch.tokens for batch in batches)
    with (reporter or Reporter.silent()).work("calibrating layer maps", tokens, "tokens") as work:
        by_tap = {tap: layer_similarity(tap, teacher, student, batches, work) for tap in taps}
    return {entry_key(stage, name): by_tap[entry.tap] for (stage, name), entry in entries.items()}


def chosen_batches(plan: Plan, rows: Rows) -> list[Batch]:
    """Return the rows that are read, documents of isolated rows apart: about `calibration.tokens` tokens."""
    count = max(FEWEST_ROWS, rows_of_tokens(rows, plan.mapping.calibration.tokens))
    chosen = select_rows(rows, count, seed=plan.mapping.seed)
    size = max(1, TOKENS_AT_A_TIME // rows.sequence_length)
    batches = [part for batch in chosen.batches(size, origin="calibration text") for part in batch.apart()]
    found = sum(int(_is_long_enough(batch).sum()) for batch in batches)
    if found < FEWEST_ROWS:
        raise DataError(
            "There is too little text to compare layers on.",
            found=f"{found} rows of {FIRST_TOKENS + 1} tokens or more, up to {rows.sequence_length}",
            allowed=f"at least {FEWEST_ROWS} rows",
            fix="give more text or a smaller data.sequence_length, or use a strategy that needs no calibration",
        )
    return batches


@torch.no_grad()
def layer_similarity(
    tap: str, teacher: Layout, student: Layout, batches: Sequence[Batch], work: Work | None = None
) -> Tensor:
    """Return the debiased CKA [student layers, teacher layers] of a tap over the rows of batches.

    Tokens are counted in `work`, once per model.
    """
    positions = max(1, min(POSITIONS, max(batch.time for batch in batches) - FIRST_TOKENS))
    ours, theirs = (_features(layout, tap, batches, positions, work) for layout in (student, teacher))
    sums = LayerSimilarity()
    for position in range(positions):
        sums.update([layer[:, position] for layer in ours], [layer[:, position] for layer in theirs])
    return sums.result().total.cpu().double()


def _lengths(batch: Batch) -> Tensor:
    full = torch.full((len(batch.input_ids),), batch.time)
    return full if batch.attention_mask is None else batch.attention_mask.sum(1).cpu()


def _is_long_enough(batch: Batch) -> Tensor:
    return _lengths(batch) > FIRST_TOKENS


def _positions_of(batch: Batch, count: int) -> Tensor:
    """Return `count` positions [rows, count] at equal distances in each row, from after its first tokens to its last.

    Rows that are shorter than that have some of them twice.
    """
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    first = min(FIRST_TOKENS, batch.time - 1)
    # The smallest amount keeps a whole number from being rounded down.
    return (first + share * (_lengths(batch)[:, None] - 1 - first) + 1e-9).long()


def _features(
    layout: Layout, tap: str, batches: Sequence[Batch], positions: int, work: Work | None
) -> Sequence[Tensor]:
    """Return what each layer gives at positions of every row, standardized: [rows, positions, dim] a layer."""
    was_training = layout.model.training
    layout.model.eval()
    kept: list[list[Tensor]] = [[] for _ in layout.blocks]
    device = next(layout.model.parameters()).device
    for batch in (given.to(device) for given in batches):
        traced = trace(layout, batch.input_ids, batch.model_mask, taps=[tap])[tap]
        at, long_enough = _positions_of(batch, positions).to(device), _is_long_enough(batch).to(device)
        for layer, features in traced.items():
            picked = features.gather(1, at[:, :, None].clamp(min=0).expand(-1, -1, features.shape[-1]))
            kept[layer].append(picked[long_enough].float())
        if work is not None:
            work.advance(batch.tokens)
    layout.model.train(was_training)
    return [_standardized(torch.cat(parts)) for parts in kept]


def _standardized(features: Tensor) -> Tensor:
    mean, deviation = features.mean((0, 1)), features.std((0, 1))
    return (features - mean) / deviation.clamp(min=SMALLEST_DEVIATION)
