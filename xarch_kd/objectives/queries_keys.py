"""Objectives between relations of values, queries or keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from xarch_kd.losses.bridge import attention_bridge, queries_and_keys
from xarch_kd.losses.relations import relation_loss
from xarch_kd.mapping_file.objectives import AttentionBridge, Relation
from xarch_kd.objectives.base import PairObjective, ProjectedPair, mixing, tensor
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.teacher.feature_cache import Feature


class RelationObjective(PairObjective):
    """Relations of values, of queries or of keys."""

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


class AttentionBridgeObjective(PairObjective):
    """Queries and keys, each through a projector of its own."""

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

    def projections(self, student: Feature, teacher: Feature) -> Iterator[ProjectedPair]:
        sides = zip(queries_and_keys(mixing(student)), queries_and_keys(mixing(teacher)), strict=True)
        for key, projector, (own, target) in zip(self.keys, self.maps, sides, strict=True):
            if projector is not None:
                yield ProjectedPair(key, projector, own.flatten(2), target.flatten(2))
