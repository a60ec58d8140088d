from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from xarch_kd.errors import ModelError
from xarch_kd.models.loading.gguf import gguf_config
from xarch_kd.models.loading.gguf_header import read_gguf_header
from xarch_kd.models.loading.reference import resolve

SIZES = {
    "context_length": 128,
    "block_count": 3,
    "feed_forward_length": 96,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return text(key) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))


def write(path: Path, architecture: str, *, name: str = "tiny", tensors: tuple[str, ...] = ("output.weight",)) -> Path:
    """Write a GGUF of metadata and empty float32 tensors of one element."""
    values: dict[str, Any] = {"general.architecture": architecture, "general.name": name}
    values |= {f"{architecture}.{key}": value for key, value in SIZES.items()}
    values[f"{architecture}.attention.layer_norm_rms_epsilon"] = 1e-5
    values[f"{architecture}.rope.freq_base"] = 5000.0
    values["tokenizer.ggml.tokens"] = ["<end>", "a", "b"]
    values["tokenizer.ggml.eos_token_id"] = 0
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    body += b"".join(entry(key, value) for key, value in values.items())
    for index, tensor in enumerate(tensors):
        body += text(tensor) + struct.pack("<IQIQ", 1, 1, 0, 32 * index)
    path.write_bytes(body + bytes(-len(body) % 32 + 32 * len(tensors)))
    return path


@pytest.mark.parametrize(
    ("architecture", "name", "tensors"),
    [
        ("llama", "tiny", ("output.weight",)),
        ("qwen2", "tiny", ("token_embd.weight", "output.weight")),
        ("qwen3", "tiny", ("token_embd.weight",)),
    ],
)
def test_gives_the_config_that_transformers_gives(
    tmp_path: Path, architecture: str, name: str, tensors: tuple[str, ...]
) -> None:
    pytest.importorskip("gguf", reason="transformers' own reader needs the gguf package")
    file = write(tmp_path / "tiny.gguf", architecture, name=name, tensors=tensors)
    expected = AutoConfig.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
    if architecture == "qwen3":
        # transformers passes over the size of heads and takes its own default.
        expected.head_dim = 64 // 4
    assert gguf_config(file) == expected
    assert gguf_config(file).vocab_size == 3
    assert gguf_config(file).tie_word_embeddings is ("output.weight" not in tensors)


def test_gives_the_config_of_a_real_file(smollm2_reference: str) -> None:
    path = resolve(smollm2_reference).path
    assert path is not None
    assert gguf_config(path) == AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def test_a_file_cut_short_anywhere_in_its_metadata_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(4, len(whole) - 64, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut.gguf is truncated or damaged"):
            read_gguf_header(cut)


def test_refuses_other_versions_and_architectures(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", "llama")
    data = bytearray(file.read_bytes())
    data[4] = 9
    (tmp_path / "version.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="a version that is not read"):
        gguf_config(tmp_path / "version.gguf")
    pytest.importorskip("gguf", reason="transformers' own reader needs the gguf package")
    with pytest.raises(ModelError, match=r"an architecture that is not read(.|\n)*abacus"):
        gguf_config(write(tmp_path / "other.gguf", "abacus"))
