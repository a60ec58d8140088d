"""Diagnosis of trained projectors: does the student fit the teacher, or the projector in its place?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from xarch_kd.projectors.base import Projector
from xarch_kd.projectors.closed_form import FORMS, ceiling, check_dims, explained_variance, resolve_init
from xarch_kd.projectors.statistics import PairStatistics

# Relative to the largest singular value: directions below it do not count towards the rank.
LEAST_DIRECTION: Final = 1e-3
# Of what a warning is given for.
USELESS: Final = 0.05
NARROW: Final = 4
ILL_CONDITIONED: Final = 1e4
ITS_OWN_WORK: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Diagnosis of a trained projector. Variances are shares of the teacher's variance on held-out tokens, at most 1.

    `rank` counts the singular values above 1/1000 of the largest, out of `possible_rank`; `condition` is the largest
    over the smallest (infinity for a singular map). `explained` is reached by the trained student and projector,
    `ceiling` is the upper bound for this rank, `alone` is reached by a projector alone with the student frozen at its
    initialization, and `share` is `alone` relative to `explained`. `warnings` are full sentences.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, LinearProjector, diagnose
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> diagnose(LinearProjector(4, 4), statistics).kind
    'linear'
    """

    kind: str
    rank: int
    possible_rank: int
    condition: float
    explained: float
    ceiling: float
    alone: float | None
    warnings: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Share of `explained` that a projector alone reaches, 0 to 1; None if not measured or nothing is explained."""
        return _share(self.explained, self.alone)

    @property
    def verdict(self) -> str:
        """The warnings, one per line, or a line that reports none."""
        if self.warnings:
            return "\n".join(self.warnings)
        found = f"ok: the student explains {self.explained:.0%} of the teacher's variance through it"
        return found if self.share is None else f"{found}, a projector alone {self.alone:.0%}"


def explained_alone(projector: Projector, fitted: PairStatistics, held_out: PairStatistics) -> float:
    """Return the share of the teacher's variance that a projector of this kind explains with the student untrained.

    It is fitted in closed form to `fitted` and measured on `held_out`: statistics of the untrained student's features
    on disjoint tokens. On the tokens of the fit it would explain noise too. An MLP is fitted as its linear
    initialization, so its value is a lower bound.

    Raises UsageError for statistics of other dimensions.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, LinearProjector, explained_alone
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> round(explained_alone(LinearProjector(4, 4), statistics, statistics), 2)
    1.0
    """
    for statistics in (fitted, held_out):
        check_dims(projector, statistics)
    how = resolve_init("auto", projector.kind)
    if how == "random":
        return explained_variance(held_out, None)
    return explained_variance(held_out, *FORMS[how].fit(projector, fitted))


def diagnose(projector: Projector, trained: PairStatistics, *, alone: float | None = None) -> Diagnosis:
    """Diagnose a trained projector.

    `trained` are statistics of `projector.split(student).features` (the student's own features unless low_rank or mlp)
    and of the teacher's, with the trained student; `alone` is `explained_alone` from before training.

    Raises UsageError for statistics of other dimensions.

    >>> import torch
    >>> from xarch_kd.projectors import PairStatistics, LinearProjector, diagnose, initialize
    >>> student = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics = PairStatistics()
    >>> statistics.update(student, 2 * student)
    >>> projector = LinearProjector(4, 4)
    >>> _ = initialize(projector, statistics)
    >>> diagnose(projector, statistics).rank
    4
    """
    with torch.no_grad():
        # Only the shapes of the split are used.
        parameter = next(projector.parameters(), torch.zeros(()))
        features, weight, bias = projector.split(parameter.new_zeros(1, projector.student_dim))
        matrix = projector.matrix().double()
    check_dims(projector, trained, features.shape[-1])
    values = torch.linalg.svdvals(matrix)[: projector.rank]
    greatest, least = float(values[0]), float(values[-1])
    rank = int((values > LEAST_DIRECTION * greatest).sum())
    condition = greatest / least if least > 0 else math.inf
    explained, highest = explained_variance(trained, weight, bias), ceiling(trained, rank)
    return Diagnosis(
        kind=projector.kind,
        rank=rank,
        possible_rank=projector.rank,
        condition=condition,
        explained=explained,
        ceiling=highest,
        alone=alone,
        warnings=tuple(_warnings(rank, projector.rank, condition, explained, highest, alone)),
    )


def _warnings(
    rank: int, possible: int, condition: float, explained: float, highest: float, alone: float | None
) -> list[str]:
    found = []
    if explained < USELESS:
        found.append(
            f"useless: through it the student explains {explained:.0%} of the teacher's variance. Check the layer map; "
            "initialize it in closed form, or raise projector_lr."
        )
    if rank * NARROW <= possible:
        found.append(
            f"narrow: it passes {rank} of {possible} directions, which cannot explain more than {highest:.0%} of the "
            "teacher's variance. Lower its weight decay, or use orthogonal."
        )
    elif condition > ILL_CONDITIONED:
        found.append(
            f"ill-conditioned: its directions differ {condition:.1e}-fold, so some of the student's learn hardly "
            "anything. Use orthogonal, or more weight decay."
        )
    share = _share(explained, alone)
    if share is not None and share >= ITS_OWN_WORK and explained >= USELESS:
        found.append(
            f"the projector does the student's work: alone, with the student untrained, it reaches {share:.0%} of the "
            "match. Lower projector_lr, use orthogonal or a lower rank, or match another layer."
        )
    return found


def _share(explained: float, alone: float | None) -> float | None:
    return None if alone is None or explained <= 0 else min(max(alone / explained, 0.0), 1.0)
