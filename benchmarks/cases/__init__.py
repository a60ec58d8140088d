"""Benchmark cases by operation. A case is data; `benchmarks.run` measures it."""

from __future__ import annotations

from typing import Final

from benchmarks.case import Case, Growth
from benchmarks.cases import (
    alignment,
    calibration,
    linear_divergence,
    mixing_apply,
    mixing_distance,
    projected_distance,
    similarity,
)

CASES: Final[dict[str, tuple[Case, ...]]] = {
    "linear_divergence": linear_divergence.CASES,
    "mixing_distance": mixing_distance.CASES,
    "projected_distance": projected_distance.CASES,
    "similarity": similarity.CASES,
    "mixing_apply": mixing_apply.CASES,
    "alignment": alignment.CASES,
    "calibration": calibration.CASES,
}
GROWTHS: Final[dict[str, tuple[Growth, ...]]] = {
    "linear_divergence": linear_divergence.GROWTHS,
    "mixing_distance": mixing_distance.GROWTHS,
    "projected_distance": projected_distance.GROWTHS,
    "similarity": similarity.GROWTHS,
    "mixing_apply": mixing_apply.GROWTHS,
    "alignment": alignment.GROWTHS,
    "calibration": calibration.GROWTHS,
}
