"""Choice of the layers of a conversion by what each new mixer alone does to the teacher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.calibration.gates import trained_gates
from xarch_kd.calibration.recall_rows import SHORTEST, RecallRows, recall_rows
from xarch_kd.calibration.substitution import SINKS, WINDOW, SubstitutedTeacher
from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import Rows, rows_of_tokens, select_rows
from xarch_kd.errors import ConversionError, DataError
from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.schema import ConversionOptions
from xarch_kd.models.conversion.convert import plan_conversion
from xarch_kd.planning.layer_choice import Key, ScoredLayer, choose_kept, guards, kept_count, ranks
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import Layout, layout_of

# Rows that the text is read in, so that an interval over rows can be computed.
TEXT_ROWS: Final = 8
# Positions of a row without comparison (attention sinks), and every how many tokens the others are compared.
FIRST_TOKENS: Final = 4
EVERY: Final = 2
# Bound on the numbers of the teacher's distributions that are kept.
MOST_LOGITS: Final = 2**25
COPYING_ROWS: Final = 2
LIST_ROWS: Final = 1


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """Text that effects of new mixers are measured on: [rows, time], places of the KL, and rows that test recall.

    `hashes` are those of the documents that the text is of.
    """

    hashes: frozenset[int]
    text: Tensor
    compared: Tensor
    recall: RecallRows

    @property
    def tokens(self) -> int:
        """Number of tokens of text."""
        return self.text.numel()


def measured_text(
    rows: Rows, tokens: int, known: Sequence[int], *, positions: int | None, seed: int, other: bool = False
) -> MeasuredText:
    """Return about `tokens` tokens of training rows as rows of equal length, and recall rows of the ids in `known`.

    With `other` they are the last ones of the order that `seed` gives, and not those without it. Rows have at most
    `positions` tokens. Raises DataError where there are fewer than two training rows.
    """
    if len(rows) < 2:
        raise DataError(
            "There is too little text to choose layers on.",
            found=f"{len(rows)} row of {rows.sequence_length} tokens",
            allowed="at least 2 rows: one to choose on, and one to compare on",
            fix="give more text, or choose the layers by a list or by strategy: uniform",
        )
    count = min(rows_of_tokens(rows, tokens), len(rows) // 2)
    chosen = select_rows(rows, count, seed=seed, from_end=other)
    parts = [_tokens_of(batch) for batch in chosen.batches(1, origin="text to choose layers on")]
    text = torch.cat(parts)
    length = min(rows.sequence_length, max(SHORTEST, tokens // TEXT_ROWS), len(text))
    most = min(len(text), tokens) // length
    text = text[: max(1, most) * length].view(-1, length)
    first = FIRST_TOKENS if length > 2 * FIRST_TOKENS else 0
    every = max(EVERY, math.ceil(text.numel() * (max(known) + 1) / MOST_LOGITS))
    compared = torch.zeros(text.shape, dtype=torch.bool)
    compared[:, first::every] = True
    recall = recall_rows(
        known, text, copying=COPYING_ROWS, lists=LIST_ROWS, longest=positions, seed=2 * seed + int(other)
    )
    return MeasuredText(hashes=frozenset(rows.hashes(chosen.chosen)), text=text, compared=compared, recall=recall)


def _tokens_of(batch: Batch) -> Tensor:
    """Return the tokens of a batch without padding, one row after another."""
    ids = batch.input_ids.flatten() if batch.valid is None else batch.input_ids.flatten()[batch.valid]
    return ids.long()


def mixer_pool(teacher: PreTrainedModel, conversion: ConversionOptions, *, seed: int) -> dict[int, Layout]:
    """Return, for each block of the teacher, the layout of a converted student with a new mixer there.

    That is one student with new mixers in all blocks, or two for a class that requires attention somewhere.
    """
    count = int(teacher.config.get_text_config().num_hidden_layers)

    def converted(*kept: int) -> Layout:
        planned = plan_conversion(
            teacher.config,
            mixer=conversion.mixer,
            keep_attention=kept,
            target=conversion.target,
            mamba2=conversion.mixer_sizes,
        )
        with warnings.catch_warnings():
            # That no block keeps its attention: this student is only measured.
            warnings.simplefilter("ignore", UserWarning)
            # The student that is trained is checked.
            student = planned.build(teacher, init=conversion.init, seed=seed, check=False)
        return layout_of(student.to(teacher.device))  # type: ignore[arg-type]  # stubs expect a bound method

    try:
        every = converted()
        return dict.fromkeys(range(count), every)
    except ConversionError:
        # Raised again by the second conversion unless the class requires attention.
        most, first = converted(0), converted(count - 1)
        return {0: first, **dict.fromkeys(range(1, count), most)}


def scored_layers(
    substituted: SubstitutedTeacher, strategy: LayerStrategy, key: Key, *, reporter: Reporter
) -> tuple[ScoredLayer, ...]:
    """Return what a new mixer in each block costs by the strategy, and which blocks keep their attention for it."""
    count = len(substituted.teacher.blocks)
    gates: list[float] | None = None
    if strategy.strategy == "greedy":
        costs, order = _greedy(substituted, strategy, key, reporter)
        # The last one to be replaced would cost most.
        scores: list[float] = [float(order.index(layer)) if layer in order else count for layer in range(count)]
    else:
        costs = _one_at_a_time(substituted, strategy, reporter)
        scores = ranks({"kl": [kl for kl, _ in costs], "recall": [recall for _, recall in costs]}, strategy.metric)
    if strategy.strategy == "gates":
        wanted = kept_count(strategy, key, count)
        gates = trained_gates(substituted, wanted, strategy.metric, steps=strategy.steps, reporter=reporter)
        scores = gates
    kept = choose_kept(strategy, key, count, scores)
    ranked = sorted(range(count), key=lambda layer: (-scores[layer], -layer))
    return tuple(
        ScoredLayer(
            layer=layer,
            kl=kl,
            recall=recall,
            rank=ranked.index(layer) + 1,
            kept=layer in kept,
            gate=None if gates is None else gates[layer],
        )
        for layer, (kl, recall) in enumerate(costs)
    )


def _one_at_a_time(
    substituted: SubstitutedTeacher, strategy: LayerStrategy, reporter: Reporter
) -> list[tuple[float, float]]:
    """Return the rise of KL and recall loss that each block's new mixer, or window, alone is the cause of.

    That is beside the teacher's other blocks, or with `one_in` beside new mixers in all others.
    """
    count = len(substituted.teacher.blocks)
    is_one_in = strategy.strategy == "one_in"
    if strategy.strategy == "window" and substituted.row_length <= WINDOW + SINKS:
        raise DataError(
            "A window changes nothing in rows that are no longer than it.",
            asked="strategy: window",
            found=f"rows of {substituted.row_length} tokens",
            allowed=f"more than {WINDOW + SINKS} tokens",
            fix="raise data.sequence_length and the strategy's tokens, or use strategy: sensitivity",
        )
    own = substituted.own
    if is_one_in:
        substituted.rebase(range(count))
        own = substituted.base_effect()
    found = []
    with reporter.work("choosing layers: one at a time", count, "layers") as work:
        for layer in range(count):
            effect = substituted.windowed(layer) if strategy.strategy == "window" else substituted.exchanged(layer)
            sign = -1 if is_one_in else 1
            found.append((sign * float(effect.kl.mean() - own.kl.mean()), sign * (effect.recall - own.recall)))
            work.advance()
    return found


def _greedy(
    substituted: SubstitutedTeacher, strategy: LayerStrategy, key: Key, reporter: Reporter
) -> tuple[list[tuple[float, float]], list[int]]:
    """Return the costs of each block when it was measured last, and the blocks in the order of their replacement.

    After each replacement only the third of the blocks that cost least before is measured again.
    """
    count = len(substituted.teacher.blocks)
    certain, replaced = guards(strategy, key)
    order, open_layers = sorted(replaced), set(range(count)) - certain - replaced
    rounds = count - kept_count(strategy, key, count) - len(order)
    costs = dict.fromkeys(range(count), (0.0, 0.0))
    substituted.rebase(order)
    measured = sorted(open_layers)
    with reporter.work("choosing layers: one after another", rounds, "layers") as work:
        for number in range(rounds):
            base = substituted.base_effect()
            for layer in measured:
                effect = substituted.exchanged(layer)
                costs[layer] = (float(effect.kl.mean() - base.kl.mean()), effect.recall - base.recall)
            best = _cheapest(measured, costs, strategy)[0]
            order.append(best)
            open_layers.discard(best)
            if number + 1 < rounds:
                substituted.rebase(order)
                measured = _cheapest(open_layers, costs, strategy)[: max(1, math.ceil(len(open_layers) / 3))]
            work.advance()
    return [costs[layer] for layer in range(count)], order


def _cheapest(layers: Collection[int], costs: Mapping[int, tuple[float, float]], strategy: LayerStrategy) -> list[int]:
    """Return blocks in the order of their costs by the strategy's metric, the one that costs least first."""
    listed = sorted(layers)
    scores = ranks(
        {"kl": [costs[layer][0] for layer in listed], "recall": [costs[layer][1] for layer in listed]}, strategy.metric
    )
    return [layer for _, layer in sorted(zip(scores, listed, strict=True))]
