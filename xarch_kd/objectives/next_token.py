"""Objective between next-token distributions, with cross-entropy on the next token."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from xarch_kd.errors import check_table
from xarch_kd.losses.tokens import token_loss
from xarch_kd.mapping_file.objectives import DIVERGENCE_OPTIONS, CustomDivergenceOptions, Tokens
from xarch_kd.mapping_file.scalars import kinds_of
from xarch_kd.objectives.base import tensor
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.ops.divergences import FORMULAS, DivergenceFormula
from xarch_kd.ops.heads import Head
from xarch_kd.planning.custom import CustomObjects
from xarch_kd.planning.objective_checks import weight_schedule
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import Feature

HEAD_INPUT: Final = Site("head_input", None)
check_table("divergences", {*FORMULAS, "custom"}, kinds_of(DIVERGENCE_OPTIONS))


class NextTokenObjective:
    """weight · T² · divergence + cross_entropy · cross-entropy, means over the step's predicted tokens.

    It reads the head inputs of both models at `HEAD_INPUT` and their heads; no logits are kept.
    """

    def __init__(self, options: Tokens, student: Layout, teacher: Layout, custom: CustomObjects) -> None:
        self.options, self._student, self._teacher = options, student, teacher
        self.schedule = weight_schedule(options.schedule)
        self._divergence = _divergence(options, custom)

    def loss(
        self, student: Feature, teacher: Feature, labels: Tensor, normalizers: LossNormalizers, progress: float
    ) -> Tensor:
        """Return the micro-batch's share of the loss at `progress`, from head inputs and labels [batch, time]."""
        factor = self.schedule.factor(progress)
        student_head, teacher_head = head_of(self._student), head_of(self._teacher)
        return token_loss(
            tensor(student).to(student_head.weight.dtype),
            student_head,
            tensor(teacher),
            teacher_head,
            labels,
            normalizer=normalizers.predictions,
            divergence=self._divergence,
            temperature=self.options.temperature,
            weight=self.options.weight * factor,
            cross_entropy=self.options.cross_entropy * factor,
            temperature_squared=self.options.temperature_squared,
            vocabulary=min(student_head.weight.shape[0], teacher_head.weight.shape[0]),
            logits_dtype=self.options.logits_dtype,
            top_k=self.options.top_k,
        ).total


def _divergence(options: Tokens, custom: CustomObjects) -> Any:
    """Return the divergence in a form that `linear_divergence` takes: a name, a mapping or a formula."""
    chosen = options.divergence
    if isinstance(chosen, CustomDivergenceOptions):
        formula: DivergenceFormula = custom.divergence(chosen.name)
        return formula
    return chosen if isinstance(chosen, str) else chosen.model_dump()


def head_of(layout: Layout) -> Head:
    """Return the output head of a model, with what is done to its logits."""
    return Head(
        weight=layout.head_weight, bias=layout.head_bias, scale=layout.logit_scale, softcap=layout.logit_softcap
    )
