"""What a stage is told by calibration text before its first step: closed-form projectors and fitted constants."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.objectives.base import PairObjective, ProjectedPair
from xarch_kd.projectors import PairStatistics, Projector, enough_tokens, initialize, resolve_start
from xarch_kd.training.aligner import Aligner

# Massive activations sit at the first tokens of a row, and would be all that a fit sees.
FIRST_TOKENS: Final = 4
# Tokens that statistics of single dimensions, or of heads, are taken from.
STATISTICS_TOKENS: Final = 4096
# Times as many tokens as a fit should have at least.
AMPLE: Final = 2


def tokens_to_prepare(aligner: Aligner) -> int:
    """Return how many tokens of calibration text the stage can use, 0 when there is nothing to fit."""
    wanted = [STATISTICS_TOKENS for match in _matches(aligner) if match.to_fit]
    wanted += [
        AMPLE * enough_tokens(projector.student_dim)
        for match in _matches(aligner)
        for projector in aligner.projectors.values()
        if isinstance(projector, Projector) and match.entry.projector_part.init != "random"
    ]
    return max(wanted, default=0)


def prepare(aligner: Aligner, batches: Iterable[Tensor]) -> list[str]:
    """Fit a stage's projectors and constants to `batches` of token ids [batch, time]; return what is worth a notice.

    A projector with `init: auto` stays random where the tokens are too few for its closed form. Raises
    UsageError for a closed form that was asked for by name with too few tokens.
    """
    statistics: dict[str, tuple[PairObjective, Projector, PairStatistics]] = {}
    for match, projection, skip in observations(aligner, batches):
        if projection is None:
            continue
        entry = statistics.setdefault(projection.key, (match, projection.projector, PairStatistics()))
        entry[2].update(projection.student[:, skip:], projection.teacher[:, skip:])
    for match in _matches(aligner):
        match.fit()
    return [
        notice
        for match, projector, found in statistics.values()
        if (notice := _start(match, projector, found)) is not None
    ]


@torch.no_grad()
def observations(
    aligner: Aligner, batches: Iterable[Tensor]
) -> Iterator[tuple[PairObjective, ProjectedPair | None, int]]:
    """Show each match the features of each batch, and yield its projections, with how many first tokens to leave out.

    The student runs in eval mode, as it is. A match without a projector is yielded once a batch, with None.
    """
    was_training = aligner.student.training
    aligner.student.eval()
    device = next(aligner.student.parameters()).device
    active_pairs = tuple(reading for entry in aligner.entries for reading in entry.active_pairs(0))
    try:
        for batch in batches:
            input_ids = batch.to(device)
            skip = FIRST_TOKENS if input_ids.shape[1] > 2 * FIRST_TOKENS else 0
            features = aligner.reader.read(input_ids, sites=aligner.sites_of(active_pairs))
            sides, _ = aligner.paired_features(active_pairs, input_ids, None, features)
            for reading in active_pairs:
                match, (student, teacher) = reading.match, sides(reading)
                match.observe(student, teacher, skip)
                found = tuple(match.projections(student, teacher))
                for projection in found or (None,):
                    yield match, projection, skip
    finally:
        aligner.student.train(was_training)


def _start(match: PairObjective, projector: Projector, statistics: PairStatistics) -> str | None:
    """Make a projector the closed form that its entry asks for; return what is worth a notice."""
    how = match.entry.projector_part.init
    form = resolve_start(how, projector.kind)
    if form == "random":
        return None
    name = match.entry.name
    if how == "auto" and statistics.tokens <= projector.student_dim:
        return (
            f"{name}: projectors start at random, because {form} needs more than {projector.student_dim} tokens of "
            f"calibration text ({enough_tokens(projector.student_dim)} say more) and there are {statistics.tokens}"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            initialize(projector, statistics, form)
        except UsageError as error:
            raise UsageError(
                f"projector of {match.pair.name}: {error.message}",
                asked=error.asked,
                found=error.found,
                allowed=error.allowed,
                fix=error.fix,
            ) from error
    return f"{name}: {caught[0].message}" if caught else None


def _matches(aligner: Aligner) -> Iterator[PairObjective]:
    for entry in aligner.entries:
        yield from entry.matches
