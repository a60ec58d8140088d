"""Whatever a well-formed mapping file asks for, making its plan either works or raises an XarchError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xarch_kd.errors import XarchError
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.render import plan_as_dict, render_plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.tiny import tiny_config


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"])


COUNTS = st.one_of(st.integers(1, 9), st.just(2**62))
LAYERS = st.one_of(st.integers(0, 4), st.just(2**62))
SELECTIONS = st.one_of(
    st.sampled_from(["every 2", "every 0", "first 1", "last 9", "none", "all", "", "every", "every 1 from 2"]),
    st.lists(LAYERS, max_size=3),
)
PATHS = st.sampled_from(["model.layers", "self_attn", "mlp", "", ".", "model", "lm_head", "no.such"])
ALIGN = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b"]),
        "tap": st.sampled_from(["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output", "head_input"]),
    },
    optional={
        "layers": st.one_of(
            st.sampled_from(["same", "replaced", "uniform"]),
            st.lists(st.fixed_dictionaries({"student": LAYERS, "teacher": LAYERS}), min_size=1, max_size=3),
        ),
        "projector": st.sampled_from(["auto", "none", "linear"]),
    },
)
STAGE = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["one", "two"]),
        "steps": COUNTS,
        "train": st.lists(
            st.sampled_from(["mixers", "blocks", "embeddings", "norms", "head", "all"]), min_size=1, max_size=2
        ),
        "inputs": st.sampled_from(["teacher", "student"]),
        "align": st.lists(ALIGN, min_size=1, max_size=2, unique_by=_name),
    },
    optional={
        "tokens": st.fixed_dictionaries({"temperature": st.just(1.0)}),
        "batches": COUNTS,
        "batch_size": COUNTS,
        "gradient_accumulation": COUNTS,
        "gradient_checkpointing": st.booleans(),
        "cache": st.one_of(
            st.sampled_from(["memory", "disk", "off"]),
            st.fixed_dictionaries({"where": st.just("disk"), "limit_gib": st.sampled_from([1e-9, 1e308])}),
        ),
    },
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny configs, by name."""
    root = tmp_path_factory.mktemp("configs")
    for name, config in {
        "llama": tiny_config("llama"),
        "qwen3": tiny_config("qwen3"),
        "narrow": tiny_config("llama", hidden_size=32),
        "mamba": tiny_config("mamba"),
    }.items():
        config.save_pretrained(root / name)
    return {path.name: str(path) for path in Path(root).iterdir()}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_plan_or_an_error_of_ours(data: st.DataObject, folders: dict[str, str], rates: Rates) -> None:
    names = st.sampled_from(sorted(folders))
    student: dict[str, Any] = {"config": folders[data.draw(names)]}
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(["keep_attention", "replace"]))
        student = {"convert": {"mixer": "mamba2", key: data.draw(SELECTIONS)}}
    if data.draw(st.integers(0, 5)) == 0:
        student["paths"] = {"blocks": data.draw(PATHS), "mixer": data.draw(PATHS), "head": data.draw(PATHS)}
    content = {
        "version": 1,
        "teacher": {"model": folders[data.draw(names)]},
        "student": student,
        "data": {"builtin": "licences", "sequence_length": data.draw(st.sampled_from([8, 1_048_576]))},
        "stages": data.draw(st.lists(STAGE, min_size=1, max_size=2, unique_by=_name)),
    }
    try:
        mapping, _ = parse_mapping(json.dumps(content))
        plan = make_plan(mapping, rates=rates)
    except XarchError as error:
        assert str(error)
        return
    json.dumps(plan_as_dict(plan), allow_nan=False)
    assert render_plan(plan)
