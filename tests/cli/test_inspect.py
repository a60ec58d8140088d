"""`xarch-kd inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPTBigCodeConfig

from tests.cli.conftest import XarchKd
from xarch_kd.cli.inspect import short_ranges

BLOCK_TAPS = {"hidden", "mixer_input", "mixer_output", "mlp_output", "mixing", "values"}
INSIDE = {"mixing": ["batch", "heads", "time", "time"], "values": ["batch", "time", "heads", "dim"]}


def test_json_lists_every_tap(teacher: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("inspect", teacher, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["model_type"] == "llama"
    assert {row["tap"] for row in found["taps"]} == {"embedding", "head_input", *BLOCK_TAPS}
    for row in found["taps"]:
        assert row["shape"] == INSIDE.get(row["tap"], ["batch", "time", 64])
        assert row["layers"] == ([0, 1, 2] if row["tap"] in BLOCK_TAPS else [])


def test_table_needs_no_weights(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
    done = xarch_kd("inspect", tmp_path)
    assert done.code == 0
    (line,) = [line for line in done.out.splitlines() if line.startswith("mixer_output")]
    assert line.split() == [
        "mixer_output",
        "0-2",
        "(batch,",
        "time,",
        "64)",
        "model.layers.*.self_attn",
        "output",
        "attention",
    ]


def test_an_unknown_family_can_be_given_by_paths(tmp_path: Path, xarch_kd: XarchKd) -> None:
    GPTBigCodeConfig(vocab_size=97, n_embd=64, n_layer=3, n_head=4).save_pretrained(tmp_path)
    refused = xarch_kd("inspect", tmp_path)
    assert refused.code == 3
    assert "gpt_bigcode" in refused.err and "paths" in refused.err
    given = xarch_kd(
        "inspect", tmp_path, "--json",
        "--path", "blocks=transformer.h", "--path", "mixer=attn", "--path", "mlp=mlp",
        "--path", "embedding=transformer.wte", "--path", "final_norm=transformer.ln_f", "--path", "head=lm_head",
    )  # fmt: skip
    assert given.code == 0, given.err
    modules = {row["tap"]: row["module"] for row in json.loads(given.out)["taps"]}
    assert modules["hidden"] == "transformer.h.*"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bloks=model.layers", "Did you mean 'blocks'?"),
        ("blocks", "takes name=attribute.path"),
        ("blocks=a", "add mixer"),
    ],
)
def test_a_wrong_path_is_a_usage_error(path: str, message: str, teacher: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("inspect", teacher, "--path", path)
    assert done.code == 2
    assert message in done.err


def test_a_folder_without_a_config_is_a_model_error(tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("inspect", tmp_path)
    assert (done.code, done.out) == (3, "")
    assert "config.json" in done.err


@pytest.mark.parametrize(("layers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 2, 3, 7), "0, 2-3, 7")])
def test_span(layers: tuple[int, ...], text: str) -> None:
    assert short_ranges(layers) == text
