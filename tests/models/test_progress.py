"""Progress of reading weights and of a conversion, as reported to the caller."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging

from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_model
from xarch_kd.models.loading.progress import weights_progress
from xarch_kd.testing.tiny import tiny_model


def test_every_tensor_of_a_checkpoint_is_counted(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    seen: list[tuple[int, int | None]] = []
    with weights_progress(lambda done, total: seen.append((done, total))):
        load_model(str(tmp_path))
    tensors = len(model.state_dict())
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1] and tensors - 1 <= len(seen) <= tensors


def test_the_gguf_readers_bar_is_counted_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    bar, seen = vars(gguf)["tqdm"], list[tuple[int, int | None]]()
    reader = SimpleNamespace(tensors=["a", "b"])
    with weights_progress(lambda done, total: seen.append((done, total))):
        assert list(vars(gguf)["tqdm"](reader.tensors, desc="Converting")) == ["a", "b"]
        assert logging.set_tqdm_hook(None) is not None
    assert seen == [(1, 2), (2, 2)]
    assert vars(gguf)["tqdm"] is bar
    assert logging.set_tqdm_hook(None) is None
    assert capsys.readouterr().err == ""


def test_a_conversion_counts_its_steps() -> None:
    seen: list[tuple[int, int]] = []
    convert(tiny_model("llama"), replace=[1], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
