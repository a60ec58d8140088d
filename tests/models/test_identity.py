"""Identity of models' files: small ones whole, large ones by samples that reach every tensor."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from xarch_kd.errors import ModelError
from xarch_kd.models.loading import identity
from xarch_kd.models.loading.identity import config_identity, file_identity, model_identity
from xarch_kd.models.loading.tokens import tokenizer_identity
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer


def test_a_small_file_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_identity(path) == f"200 bytes, sha256 {digest[:16]}"


def test_of_a_large_file_a_change_of_any_tensor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "END_BYTES", 100)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 8)
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    before = model_identity(str(tmp_path))
    assert set(before) == {"config.json", "model.safetensors"}
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 0.01}, file, {"format": "pt"})
        assert model_identity(str(tmp_path)) != before, name
    save_file(tensors, file, {"format": "pt"})
    assert model_identity(str(tmp_path)) == before


def test_shards_are_named_and_files_that_are_not_loaded_do_not_count(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    found = model_identity(str(tmp_path))
    assert len(shards) > 1
    assert set(found) == shards | {"config.json", "model.safetensors.index.json"}
    save_file({"lora": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert model_identity(str(tmp_path)) == found


def test_a_config_is_identified_by_its_file(tmp_path: Path) -> None:
    tiny_model("mamba2").config.save_pretrained(tmp_path)
    assert config_identity(str(tmp_path)) == {"config.json": file_identity(tmp_path / "config.json")}
    with pytest.raises(ModelError):
        config_identity(str(tmp_path / "absent"))


def test_a_hub_model_is_identified_by_the_commit_that_its_revision_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = ["a" * 40, "b" * 40]
    repository = tmp_path / "models--owner--name"
    for commit in commits:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
    (repository / "refs").mkdir()
    monkeypatch.setattr(identity, "cached_file", partial(cached_file, cache_dir=str(tmp_path), local_files_only=True))
    for commit in commits:
        (repository / "refs" / "main").write_text(commit)
        assert model_identity("owner/name") == {"commit": commit}
    assert model_identity("owner/name", commits[0]) == {"commit": commits[0]}
    with pytest.raises(ModelError, match="could not be found on the hub"):
        model_identity("owner/other")


def test_a_tokenizer_is_its_rules_and_not_what_calls_left_in_it() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["one", "two of them"], padding=True, truncation=True, max_length=4)
    assert tokenizer_identity(tokenizer) == before
    others = [tiny_tokenizer() for _ in range(3)]
    others[0].chat_template = "{{ messages }}"
    others[1].add_special_tokens({"sep_token": "#"})
    others[2].backend_tokenizer.pre_tokenizer = None
    assert len({before, *map(tokenizer_identity, others)}) == 4
