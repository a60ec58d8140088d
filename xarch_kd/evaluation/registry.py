"""Registry of suites: one file and one row for each name that `evaluate.suites` may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, get_args

from xarch_kd.errors import check_table
from xarch_kd.evaluation.base import Subjects, Suite
from xarch_kd.evaluation.cost import Cost
from xarch_kd.evaluation.diversity import diversity_cost, measure_diversity
from xarch_kd.evaluation.exposure import exposure_cost, measure_exposure
from xarch_kd.evaluation.generation_suite import generation_cost, measure_generation
from xarch_kd.evaluation.likelihood_suite import (
    likelihood_from_json,
    likelihood_markdown,
    likelihood_tables,
    likelihood_to_json,
    measure_likelihood,
)
from xarch_kd.evaluation.long_range import long_range_cost, measure_long_range
from xarch_kd.evaluation.speed_suite import (
    measure_speed,
    speed_from_json,
    speed_markdown,
    speed_tables,
    speed_to_json,
)
from xarch_kd.evaluation.suite_result import (
    SuiteResult,
    result_from_json,
    result_markdown,
    result_tables,
    result_to_json,
)
from xarch_kd.mapping_file.schema import SuiteName


def _suite(
    name: str,
    title: str,
    measure: Callable[[Subjects], SuiteResult],
    cost: Callable[[Subjects], Mapping[str, Cost]],
    *,
    needs_text: bool = True,
) -> Suite:
    """Return a suite whose result is a `SuiteResult`."""
    return Suite(
        measure=measure,
        to_json=result_to_json,
        from_json=result_from_json,
        tables=lambda evaluation: result_tables(title, evaluation.results[name]),
        markdown=lambda evaluation: result_markdown(title, evaluation.results[name]),
        cost=cost,
        needs_text=needs_text,
    )


# In the order in which they are measured and printed: `speed` rounds both models to its dtype, so it is the last.
SUITES: Final[dict[str, Suite]] = {
    "likelihood": Suite(
        measure=measure_likelihood,
        to_json=likelihood_to_json,
        from_json=likelihood_from_json,
        tables=likelihood_tables,
        markdown=likelihood_markdown,
    ),
    "exposure": _suite("exposure", "Exposure: errors on the student's own text", measure_exposure, exposure_cost),
    "generation": _suite(
        "generation", "Generation: the same questions by likelihood and by writing", measure_generation, generation_cost
    ),
    "diversity": _suite("diversity", "Diversity of what the models write", measure_diversity, diversity_cost),
    "long_range": _suite(
        "long_range", "Long range: accuracy of finding again what was read", measure_long_range, long_range_cost
    ),
    "speed": Suite(
        measure=measure_speed,
        to_json=speed_to_json,
        from_json=speed_from_json,
        tables=speed_tables,
        markdown=speed_markdown,
        needs_text=False,
    ),
}

check_table("evaluation suites", SUITES, get_args(SuiteName))
