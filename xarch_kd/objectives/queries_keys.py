"""Objectives between queries, keys and values: relations of tokens, and distances through projectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor, nn

from xarch_kd.errors import check_table
from xarch_kd.losses.bridge import attention_bridge, queries_and_keys
from xarch_kd.losses.features import LOSSES
from xarch_kd.losses.relations import relation_loss
from xarch_kd.mapping_file.losses import AttentionBridge, Relation
from xarch_kd.objectives.base import PairObjective, ProjectedPair, mixing, tensor
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.projectors import Projector
from xarch_kd.teacher.feature_cache import Feature


class RelationObjective(PairObjective):
    """Divergence between relations of values, of queries or of keys."""

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        loss = self.entry.loss
        assert isinstance(loss, Relation)
        own, target = (self._heads(loss, feature).float() for feature in (student, teacher))
        return relation_loss(own, target, normalizer=normalizers.tokens, mask=mask, heads=loss.heads)

    def _heads(self, loss: Relation, feature: Feature) -> Tensor:
        if loss.of is None:
            return tensor(feature)
        query, key = queries_and_keys(mixing(feature))
        return query if loss.of == "queries" else key


# Relative errors need the teacher's norm over a whole step, which a bridge does not gather.
check_table(
    "distances of an attention bridge",
    {name for name, row in LOSSES.items() if not row.over_teacher_energy},
    get_args(AttentionBridge.model_fields["distance"].annotation),
)


class AttentionBridgeObjective(PairObjective):
    """Distance between queries and between keys, each through a projector of its own."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        assert self.pair.bridge is not None
        self.keys = tuple(f"{self.pair.projector_key}-{side}" for side in ("query", "key"))
        self.maps = tuple(
            self._projector(modules, key, dims, generator)
            for key, dims in zip(self.keys, self.pair.bridge, strict=True)
        )

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, normalizers: LossNormalizers) -> Tensor:
        loss = self.entry.loss
        assert isinstance(loss, AttentionBridge)
        return attention_bridge(
            queries_and_keys(mixing(student)),
            queries_and_keys(mixing(teacher)),
            normalizer=normalizers.tokens,
            query_map=self.maps[0],
            key_map=self.maps[1],
            mask=mask,
            kind=loss.distance,
            epsilon=loss.epsilon,
            delta=loss.delta,
        )

    @property
    def fitted_projectors(self) -> tuple[Projector | None, ...]:
        """The projectors of queries and keys."""
        return self.maps

    def projections(self, student: Feature, teacher: Feature) -> Iterator[ProjectedPair]:
        sides = zip(queries_and_keys(mixing(student)), queries_and_keys(mixing(teacher)), strict=True)
        for key, projector, (own, target) in zip(self.keys, self.maps, sides, strict=True):
            if projector is not None and projector.has_closed_form:
                yield ProjectedPair(key, projector, own.flatten(2), target.flatten(2))
