"""Floor 3: objectives. Each is a sum over tokens over a count of the whole step, so micro-batches add up."""

from __future__ import annotations

from xarch_kd.losses.features import feature_loss, feature_normaliser, teacher_energy, token_count
from xarch_kd.losses.tokens import Head, TokenLoss, label_count, next_token_labels, token_loss

__all__ = [
    "Head",
    "TokenLoss",
    "feature_loss",
    "feature_normaliser",
    "label_count",
    "next_token_labels",
    "teacher_energy",
    "token_count",
    "token_loss",
]
