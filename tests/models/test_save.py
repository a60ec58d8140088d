from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from xarch_kd.errors import CheckpointError, ModelError, UsageError
from xarch_kd.models.loading.load import load_model
from xarch_kd.models.loading.save import save_student
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


def test_saves_model_and_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    folder = save_student(tiny_model("bamba"), tiny_tokenizer(), tmp_path / "runs" / "student")
    assert [entry.name for entry in folder.parent.iterdir()] == ["student"]
    assert AutoTokenizer.from_pretrained(folder)("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    assert load_model(str(folder)).config.model_type == "bamba"


def test_a_folder_that_holds_something_is_left_alone_unless_told(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="already holds something"):
        save_student(tiny_model("bamba"), None, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    folder = save_student(tiny_model("bamba"), None, tmp_path / "student")
    save_student(tiny_model("bamba", seed=1), None, folder, overwrite=True)
    expected = tiny_model("bamba", seed=1).state_dict()["lm_head.weight"]
    assert torch.equal(load_model(str(folder)).state_dict()["lm_head.weight"], expected)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model("bamba")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mamba.D")[0] = float("inf")
    with pytest.raises(ModelError, match=r"NaN or infinite weights(.|\n)*model.layers.0.mamba.D"):
        save_student(model, None, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_previous_student_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_student(tiny_model("bamba"), None, tmp_path / "student")
    before = (folder / "model.safetensors").read_bytes()

    def full(self: PreTrainedModel, target: Path, **options: Any) -> None:
        Path(target).mkdir()
        (Path(target) / "model.safetensors").write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot write student[\s\S]*no space left[\s\S]*before are intact"):
        save_student(tiny_model("bamba", seed=1), None, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]
