"""Configs with infinite numbers, as transformers writes them, are read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from xarch_kd.models.loading.load import load_config
from xarch_kd.models.loading.reference import read_config_json
from xarch_kd.testing.tiny import tiny_config


def test_a_saved_bamba_config_is_read_back_equal(tmp_path: Path) -> None:
    config = tiny_config("bamba")
    config.save_pretrained(tmp_path)
    loaded = load_config(str(tmp_path))
    assert loaded.time_step_limit[1] == math.inf
    assert loaded.to_dict() == {**config.to_dict(), "transformers_version": loaded.transformers_version}


@pytest.mark.parametrize("tag", ["Infinity", "-Infinity", "NaN"])
def test_each_special_number(tag: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"limit": [0.0, {"__float__": tag}]}))
    assert str(read_config_json(tmp_path)["limit"][1]) == str(float(tag))


def test_another_tag_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"limit": {"__float__": ["huge"]}}))
    assert read_config_json(tmp_path)["limit"] == {"__float__": ["huge"]}
