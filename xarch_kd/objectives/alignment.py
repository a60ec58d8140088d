"""Objectives of one `align` entry: its pairs, their layer map and their schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from xarch_kd.errors import NonFiniteLoss, XarchError
from xarch_kd.layer_mapping import LearnedMap, build_layer_map
from xarch_kd.layer_mapping.layer_map import LayerMap
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.objectives.base import PairObjective
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.objectives.registry import build_objective
from xarch_kd.ops import checks
from xarch_kd.planning.custom import CustomObjects
from xarch_kd.planning.layer_maps import is_learned, redraw_period, strategy_of
from xarch_kd.planning.objective_checks import weight_schedule
from xarch_kd.planning.plan import PairPlan
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import Feature


class ActivePair(NamedTuple):
    """The objective of a pair, and the teacher's site that it is compared with at this step."""

    objective: PairObjective
    site: Site

    @property
    def student_layer(self) -> int | None:
        """The student's block."""
        return self.objective.pair.student_layer


Value = TypeVar("Value")
Sides = Callable[[ActivePair], tuple[Feature, Feature]]


class Alignment:
    """The objectives of an entry's pairs. `map` is a layer map that trains, registered in `maps`."""

    def __init__(
        self,
        align: Align,
        pairs: Sequence[PairPlan],
        depths: tuple[int, int],
        *,
        projectors: nn.ModuleDict,
        maps: nn.ModuleDict,
        generators: Callable[[PairPlan], torch.Generator],
        custom: CustomObjects,
    ) -> None:
        self.align, self.depths = align, depths
        self.objectives = tuple(build_objective(pair, align, projectors, generators(pair), custom) for pair in pairs)
        self.schedule = weight_schedule(align.schedule)
        self.map: LearnedMap | None = None
        self._period = redraw_period(align)
        # Without the student's blocks that nothing trained reaches.
        self.students = tuple(dict.fromkeys(pair.student_layer for pair in pairs))
        if is_learned(align):
            options: dict[str, Any] = strategy_of(align)[1]
            self.map = LearnedMap(len(self.students), depths[1], **options)
            maps[align.name] = self.map

    def fitted_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the entry's projectors if these start in closed form."""
        if self.align.projector_part.init == "random":
            return []
        projectors = (projector for objective in self.objectives for projector in objective.fitted_projectors)
        return [
            parameter
            for projector in projectors
            if projector is not None and projector.has_closed_form
            for parameter in projector.parameters()
        ]

    def active_pairs(self, step: int) -> tuple[ActivePair, ...]:
        """Return the pairs with the teacher's sites of this step."""
        redrawn = self._drawn(step)
        return tuple(
            ActivePair(
                objective,
                Site(objective.pair.tap, redrawn.get(objective.pair.student_layer, objective.pair.teacher_layer)),
            )
            for objective in self.objectives
        )

    def _drawn(self, step: int) -> dict[int | None, int | None]:
        """Return the teacher layer of each student layer if the layer map is redrawn every N steps."""
        if self._period is None:
            return {}
        options = {**strategy_of(self.align)[1], "draw": step // self._period}
        del options["redraw"]
        drawn = build_layer_map("random", *self.depths, options=options)
        return {student: teacher for student, teacher, _ in drawn.pairs()}

    def terms(
        self,
        active_pairs: Sequence[ActivePair],
        sides: Sides,
        mask: Tensor | None,
        normalizers: LossNormalizers,
        progress: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of the student's loss, weighted and by pair, and those that train maps alone."""
        factor = self.align.weight * self.schedule.factor(progress)
        losses: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        for pair in active_pairs:
            objective, (student, teacher) = pair.objective, sides(pair)
            name = objective.pair.name
            losses[name] = name_nonfinite(
                name, lambda objective=objective, sides=(student, teacher): objective.loss(*sides, mask, normalizers)
            )
            auxiliary = objective.map_objective(student, teacher, mask)
            if auxiliary is not None:
                own[f"{name}-heads"] = auxiliary
        if self.map is None:
            # A pair's weight is the entry's number times its share of the layer map.
            shares = {objective.pair.name: objective.pair.weight / self.align.weight for objective in self.objectives}
            return {name: factor * shares[name] * loss for name, loss in losses.items()}, own
        matched = self.map(torch.stack(list(losses.values())).view(len(self.students), -1), progress)
        own[f"{self.align.name}-map"] = matched.map
        names = (f"{self.align.name}.{layer}" for layer in self.students)
        return {name: factor * loss for name, loss in zip(names, matched.student, strict=True)}, own

    def layer_map(self, progress: float) -> LayerMap | None:
        """Return the learned layer map at `progress`, None for a fixed one."""
        return None if self.map is None else self.map.layer_map(progress)


def name_nonfinite(name: str, compute: Callable[[], Value]) -> Value:
    """Return the value of `compute`; a NonFiniteLoss, of a deferred check too, names the objective."""

    def named(error: XarchError) -> XarchError:
        if not isinstance(error, NonFiniteLoss):
            return error
        return NonFiniteLoss(error.message, asked=f"objective {name}", found=error.found)

    with checks.renaming_errors(named):
        return compute()
