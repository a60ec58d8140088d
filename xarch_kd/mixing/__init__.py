"""Floor 1: token-mixing matrices held as factors, never as tokens × tokens."""

from __future__ import annotations
