"""A tiny teacher in a folder, and mapping files about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, TEXT, Write
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text whose paragraphs all differ."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number}. {TEXT}" for number in range(120)), encoding="utf-8")
    return path


@pytest.fixture
def write_mapping(tmp_path: Path, teacher_folder: Path, text_file: Path) -> Write:
    """Write a mapping file: `stages` (default: the two above) and anything else that replaces a top-level entry."""

    def write(*stages: dict[str, Any], name: str = "mapping.yaml", **changes: Any) -> Path:
        mapping: dict[str, Any] = {
            "version": 1,
            "teacher": {"model": str(teacher_folder)},
            "student": {"convert": {"mixer": "mamba2", "replace": [1, 2]}},
            "data": {"files": [str(text_file)], "sequence_length": 16, "batch_size": 2},
            "device": "cpu",
            "stages": list(stages) or [MIXER_STAGE, LOGIT_STAGE],
            **changes,
        }
        path = tmp_path / name
        # Through JSON, so that a dict used twice is not written as an anchor.
        path.write_text(yaml.safe_dump(json.loads(json.dumps(mapping)), sort_keys=False), encoding="utf-8")
        return path

    return write
