"""Results in a model card's metadata, read back as hubs read them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from xarch_kd.evaluation.results import Evaluation, from_json
from xarch_kd.job.model_index import model_index
from xarch_kd.testing.reports import likelihood, suite


def evaluation(**results: object) -> Evaluation:
    stored = {"format": 2, "teacher": "t", "student": "s", "level": 0.95, "resamples": 2000, "seed": 0}
    return from_json(json.dumps({**stored, "results": results}))


def test_figures_signatures_and_intervals_are_read_back() -> None:
    figure = suite()["figures"][0]
    without = figure | {"name": "end rate", "value": None, "low": None, "high": None, "student": 0.25, "unit": "%"}
    unknown = figure | {"name": "unknown", "value": None, "student": None}
    measured = evaluation(likelihood=[likelihood(0.25)], exposure=suite(figures=[figure, without, unknown]))
    data = ModelCardData(model_name="run: α", eval_results=model_index(measured))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    stored: Any = card.data
    assert stored.model_name == "run: α"
    found = {(one.dataset_type, one.metric_type): one for one in stored.eval_results}
    assert set(found) == {
        ("held-out", "perplexity"),
        ("held-out", "nll_difference"),
        ("exposure", "distinct-2"),
        ("exposure", "end_rate"),
    }
    difference = found["held-out", "nll_difference"]
    assert (difference.metric_value, difference.dataset_revision) == (0.25, "f" * 16)
    assert difference.metric_args == {"low": 0.125, "high": 0.375, "level": 0.95, "tokens": 60}
    # exp(2.25), of the NLL and not of what the file lists beside it.
    assert found["held-out", "perplexity"].metric_value == pytest.approx(9.487735836)
    ratio = found["exposure", "distinct-2"]
    assert (ratio.metric_value, ratio.dataset_revision) == (0.5, "diversity.v1")
    assert ratio.metric_args == {
        **{"compared": "ratio", "teacher": 0.8, "student": 0.4, "low": 0.4, "high": 0.6, "level": 0.95, "prompts": 32}
    }
    own = found["exposure", "end_rate"]
    assert (own.metric_value, own.metric_name) == (0.25, "end rate, %")
    assert own.metric_args == {"compared": "value", "teacher": 0.8, "student": 0.25, "level": 0.95, "prompts": 32}
