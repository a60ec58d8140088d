"""Sizes of a converted student's mixers, from the mapping file to the model that is trained."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from xarch_kd.errors import ConversionError, MappingFileError
from xarch_kd.job.models import load_models, load_run_tokenizer
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.testing.mapping import LOGIT_STAGE, Write

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


def converting(**changes: Any) -> dict[str, Any]:
    return {"convert": {"mixer": "mamba2", "replace": [1, 2], "mamba2": {"expand": 2, "proj_bias": False}} | changes}


def test_the_student_has_the_sizes_of_its_plan(write_mapping: Write) -> None:
    plan = make_plan(write_mapping(LOGIT_STAGE, student=converting()), rates=RATES)
    assert any("proj_bias: false" in warning for warning in plan.warnings)
    models = load_models(plan, load_run_tokenizer(plan), Reporter(Console(file=io.StringIO())))
    config: Any = models.student.config
    assert (config.mamba_expand, config.mamba_d_head, config.mamba_n_groups) == (2, 32, 4)
    assert config.mamba_proj_bias is False
    assert models.student.model.layers[1].mamba.in_proj.bias is None


@pytest.mark.parametrize("changes", [{"mixer": "gated_delta"}, {"target": "in_place"}], ids=["delta", "in_place"])
def test_sizes_of_other_mixers_are_refused(write_mapping: Write, changes: dict[str, Any]) -> None:
    with pytest.raises(MappingFileError, match="mamba2 sets sizes of a stock class"):
        make_plan(write_mapping(LOGIT_STAGE, student=converting(**changes)), rates=RATES)


def test_a_number_of_groups_that_does_not_divide_is_refused(write_mapping: Write) -> None:
    with pytest.raises(ConversionError, match=r"student\.convert(.|\n)*do not divide evenly over the groups"):
        make_plan(write_mapping(LOGIT_STAGE, student=converting(mamba2={"n_groups": 3})), rates=RATES)
