"""Registry of suites: one file and one row for each name that `evaluate.suites` may have."""

from __future__ import annotations

import dataclasses
from typing import Final, get_args

from xarch_kd.errors import check_table
from xarch_kd.evaluation.base import Suite
from xarch_kd.evaluation.copying import CopyingResult, copying_lines, copying_markdown, measure_copying
from xarch_kd.evaluation.likelihood_suite import (
    likelihood_from_json,
    likelihood_markdown,
    likelihood_tables,
    likelihood_to_json,
    measure_likelihood,
)
from xarch_kd.evaluation.speed_suite import (
    measure_speed,
    speed_from_json,
    speed_markdown,
    speed_tables,
    speed_to_json,
)
from xarch_kd.mapping_file.schema import SuiteName

# In the order in which they are measured and printed: `speed` rounds both models to its dtype, so it is the last.
SUITES: Final[dict[str, Suite]] = {
    "likelihood": Suite(
        measure=measure_likelihood,
        to_json=likelihood_to_json,
        from_json=likelihood_from_json,
        tables=likelihood_tables,
        markdown=likelihood_markdown,
    ),
    "copying": Suite(
        measure=measure_copying,
        to_json=dataclasses.asdict,
        from_json=lambda data: CopyingResult(**data),
        tables=copying_lines,
        markdown=copying_markdown,
    ),
    "speed": Suite(
        measure=measure_speed,
        to_json=speed_to_json,
        from_json=speed_from_json,
        tables=speed_tables,
        markdown=speed_markdown,
    ),
}

check_table("evaluation suites", SUITES, get_args(SuiteName))
