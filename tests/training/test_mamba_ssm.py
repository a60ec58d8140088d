"""`Aligner` trains a live `mamba_ssm.MambaLMHeadModel`, planned from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.mamba_ssm_peer import needs_mamba_ssm
from tests.training.mamba_ssm_aligner import main
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.mamba_ssm.format import export_mamba_ssm, import_mamba_ssm
from xarch_kd.testing.launch import in_a_fork
from xarch_kd.testing.tiny import VOCABULARY, tiny_model, tiny_tokenizer

pytestmark = needs_mamba_ssm

MIXING = {"kind": "mixing", "distance": "cosine"}
STAGES: list[dict[str, Any]] = [
    {
        "name": "mixers",
        "steps": 8,
        "train": ["mixers"],
        "inputs": "teacher",
        "align": [
            {"name": "output", "tap": "mixer_output", "layers": "replaced", "loss": {"kind": "normalised_mse"}},
            {"name": "mixing", "tap": "mixing", "layers": "replaced", "loss": MIXING},
        ],
    },
    {
        "name": "all",
        "steps": 8,
        "train": ["all"],
        "align": [{"name": "hidden", "tap": "hidden", "layers": "same"}],
        "tokens": {"divergence": "forward_kl"},
    },
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the run, and what the program told of its stages."""
    root = tmp_path_factory.mktemp("aligned")
    teacher = tiny_model("llama", rms_norm_eps=1e-5)
    teacher.save_pretrained(root / "teacher")
    tiny_tokenizer().save_pretrained(root / "teacher")
    export_mamba_ssm(convert(teacher, mixer="mamba2", replace=[0, 2]), root / "student", tiny_tokenizer())
    ids = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(6))
    torch.save(ids, root / "ids.pt")
    mapping = {
        "version": 1,
        "teacher": {"model": str(root / "teacher")},
        "student": {"model": str(root / "student")},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "device": "cpu",
        "stages": STAGES,
    }
    (root / "mapping.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    in_a_fork(main, root)
    return root, json.loads((root / "stages.json").read_text())


def test_losses_fall_in_both_kinds_of_stage(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    _, stages = trained
    assert [stage["stage"] for stage in stages] == ["mixers", "all"]
    for stage in stages:
        assert stage["losses"][-1] < 0.9 * stage["losses"][0], stage["stage"]


def test_what_the_plan_names_learns(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    root, (mixers, everything) = trained
    places = {name.rsplit("mixer.", 1)[0] for name in mixers["changed"]}
    assert places == {"backbone.layers.0.", "backbone.layers.2."}
    state = torch.load(root / "student" / "pytorch_model.bin", weights_only=True)
    assert set(everything["changed"]) == set(state)


def test_the_trained_model_comes_back_as_a_stock_one(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = trained
    back = import_mamba_ssm(root / "trained")
    # The padding of its MLPs learned nothing.
    assert back.config.to_dict()["intermediate_size"] == 96
    assert not back.get_parameter("model.final_layernorm.weight").equal(
        import_mamba_ssm(root / "student").get_parameter("model.final_layernorm.weight")
    )
