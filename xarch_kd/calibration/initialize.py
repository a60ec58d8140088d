"""Calibrate a stage before training: closed-form projector initialization and feature statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Final

import torch

from xarch_kd.data.batches import Batch
from xarch_kd.errors import UsageError
from xarch_kd.objectives.base import PairObjective, ProjectedPair
from xarch_kd.projectors import PairStatistics, Projector, enough_tokens, initialize, resolve_init
from xarch_kd.training.aligner import Aligner

# Attention sinks: massive activations at the first tokens of a row would dominate every fit.
FIRST_TOKENS: Final = 4
# Tokens of calibration text that statistics of single dimensions, or of heads, are taken from.
STATISTICS_TOKENS: Final = 4096
# Times as many tokens as a fit should have at least.
AMPLE: Final = 2


def tokens_to_prepare(aligner: Aligner) -> int:
    """Return the number of tokens of calibration text that the stage can use, 0 when there is nothing to fit."""
    wanted = [STATISTICS_TOKENS for objective in _objectives(aligner) if objective.to_fit]
    wanted += [
        AMPLE * enough_tokens(projector.student_dim)
        for objective in _objectives(aligner)
        for projector in aligner.projectors.values()
        if isinstance(projector, Projector) and objective.entry.projector_part.init != "random"
    ]
    return max(wanted, default=0)


def prepare(aligner: Aligner, batches: Iterable[Batch]) -> list[str]:
    """Fit a stage's projectors and constants to `batches` of calibration text, and return notices to print.

    A projector with `init: auto` stays random where the tokens are too few for its closed form. Raises
    UsageError for an explicitly requested closed form with too few tokens.
    """
    statistics: dict[str, tuple[PairObjective, Projector, PairStatistics]] = {}
    for objective, projection, skip in observations(aligner, batches):
        if projection is None:
            continue
        entry = statistics.setdefault(projection.key, (objective, projection.projector, PairStatistics()))
        entry[2].update(projection.student[:, skip:], projection.teacher[:, skip:])
    for objective in _objectives(aligner):
        objective.fit()
    return [
        notice
        for objective, projector, found in statistics.values()
        if (notice := _start(objective, projector, found)) is not None
    ]


@torch.no_grad()
def observations(
    aligner: Aligner, batches: Iterable[Batch]
) -> Iterator[tuple[PairObjective, ProjectedPair | None, int]]:
    """Pass each objective the features of each batch, and yield its projections and the number of first tokens to skip.

    The student runs in eval mode, as it is. An objective without a projector is yielded once per batch, with None.
    """
    was_training = aligner.student.training
    aligner.student.eval()
    device = next(aligner.student.parameters()).device
    pairs = tuple(pair for entry in aligner.entries for pair in entry.active_pairs(0))
    try:
        for batch in (part.to(device) for given in batches for one in given.apart() for part in one.unpadded()):
            skip = FIRST_TOKENS if batch.input_ids.shape[1] > 2 * FIRST_TOKENS else 0
            features = aligner.reader.read(batch, sites=aligner.sites_of(pairs))
            sides, _ = aligner.paired_features(pairs, batch, features)
            for pair in pairs:
                objective, (student, teacher) = pair.objective, sides(pair)
                objective.observe(student, teacher, skip)
                found = tuple(objective.projections(student, teacher))
                for projection in found or (None,):
                    yield objective, projection, skip
    finally:
        aligner.student.train(was_training)


def _start(objective: PairObjective, projector: Projector, statistics: PairStatistics) -> str | None:
    """Initialize a projector by the closed form of its entry, and return a notice to print, if any."""
    how = objective.entry.projector_part.init
    form = resolve_init(how, projector.kind)
    if form == "random":
        return None
    name = objective.entry.name
    if how == "auto" and statistics.tokens <= projector.student_dim:
        return (
            f"{name}: projectors start at random, because {form} needs more than {projector.student_dim} tokens of "
            f"calibration text ({enough_tokens(projector.student_dim)} are recommended); found {statistics.tokens}"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            initialize(projector, statistics, form)
        except UsageError as error:
            raise UsageError(
                f"projector of {objective.pair.name}: {error.message}",
                asked=error.asked,
                found=error.found,
                allowed=error.allowed,
                fix=error.fix,
            ) from error
    return f"{name}: {caught[0].message}" if caught else None


def _objectives(aligner: Aligner) -> Iterator[PairObjective]:
    for entry in aligner.entries:
        yield from entry.objectives
