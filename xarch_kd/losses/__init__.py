"""Objectives as functions of tensors, student first. Each is a sum over tokens divided by a normalizer of the whole
optimizer step, so that micro-batches add up.

`cka_loss` alone is not: its micro-batches add up to the mean of their own.
"""

from __future__ import annotations

from xarch_kd.losses.balance import Balance
from xarch_kd.losses.bridge import QueriesAndKeys, attention_bridge, bridge_dims, queries_and_keys
from xarch_kd.losses.cka import cka_loss
from xarch_kd.losses.features import feature_loss, feature_normalizer, teacher_energy, token_count
from xarch_kd.losses.mixing import mixing_loss
from xarch_kd.losses.relations import gram_loss, relation_heads, relation_loss
from xarch_kd.losses.schedules import WeightSchedule
from xarch_kd.losses.standardize import FeatureStatistics, Standardizer
from xarch_kd.losses.tokens import TokenLoss, label_count, next_token_labels, token_loss
from xarch_kd.ops.heads import Head

__all__ = [
    "Balance",
    "FeatureStatistics",
    "Head",
    "QueriesAndKeys",
    "Standardizer",
    "TokenLoss",
    "WeightSchedule",
    "attention_bridge",
    "bridge_dims",
    "cka_loss",
    "feature_loss",
    "feature_normalizer",
    "gram_loss",
    "label_count",
    "mixing_loss",
    "next_token_labels",
    "queries_and_keys",
    "relation_heads",
    "relation_loss",
    "teacher_energy",
    "token_count",
    "token_loss",
]
