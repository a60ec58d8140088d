"""Tokens that count in an objective: their mask, their number, and a micro-batch's share of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.losses.features import divisor
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.ops import checks


def counts_of(entry: Align, batch: Batch) -> tuple[Tensor | None, int]:
    """Return the mask [batch, time] of the tokens that count in an entry, None for all, and their number."""
    if entry.tokens == "labelled":
        return batch.labelled_mask, batch.labelled_tokens
    return batch.attention_mask, batch.tokens


def shares_of(maps: Mapping[str, Tensor], count: int, normalizers: LossNormalizers) -> dict[str, Tensor]:
    """Return the objectives of learned maps, weighted by the share `count` that this micro-batch has of the tokens.

    They are ratios of sums, so that micro-batches add up to the mean of their own values and not to the value of one
    large batch.
    """
    return {name: term * (count / divisor(normalizers.tokens, term)) for name, term in maps.items()}


def make_indices_known(collector: checks.DeferredChecks, batch: Batch) -> None:
    """Give a collector the indices of the tokens that count, so that no operation reads them from the device."""
    if batch.attention_mask is not None:
        collector.set_indices(batch.attention_mask, batch.valid)
    if batch.labelled_mask is not None:
        collector.set_indices(batch.labelled_mask, batch.labelled)
    collector.set_indices(batch.next_tokens, batch.predicted)
