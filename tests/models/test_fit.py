"""Checks of a loaded model: weights without a place, NaN, tied heads, damaged indexes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from xarch_kd.cli.app import main
from xarch_kd.errors import ModelError
from xarch_kd.models.loading.load import check_files, load_config, load_model, meta_model
from xarch_kd.models.loading.stored import same_bytes, stored_tensors
from xarch_kd.testing.tiny import SIZES, tiny_model

Edit = Callable[[dict[str, Tensor]], None]


def saved(folder: Path, *, edit: Edit | None = None, config: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """Save a tiny Llama of `sizes`, with edited tensors and other entries in config.json."""
    tiny_model("llama", **sizes).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if edit is not None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def add(**tensors: Tensor) -> Edit:
    """Return an edit that adds tensors; `__` in a name stands for a dot."""
    return lambda found: found.update({name.replace("__", "."): value for name, value in tensors.items()})


def wrap(prefix: str) -> Edit:
    """Return an edit that puts `prefix` before every key."""

    def edit(found: dict[str, Tensor]) -> None:
        for name in list(found):
            found[prefix + name] = found.pop(name)

    return edit


QUERY = "model__layers__0__self_attn__q_proj__"
REFUSED = {
    "attention biases": (
        {"attention_bias": True},
        {"attention_bias": False},
        None,
        r"12 weights(.|\n)*q_proj.bias|bias",
    ),
    "MLP biases": ({"mlp_bias": True}, {"mlp_bias": False}, None, r"9 weights(.|\n)*mlp_bias: false"),
    "more layers": (
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 3},
        None,
        r"9 weights(.|\n)*it has 3, and",
    ),
    "FP8 scales": ({}, {}, add(**{QUERY + "weight_scale_inv": torch.ones(1)}), r"1 weights(.|\n)*quantized"),
    "packed integers": ({}, {}, add(**{QUERY + "qweight": torch.ones(4, dtype=torch.int32)}), "quantized"),
    "LoRA": ({}, {}, add(**{QUERY + "lora_A__weight": torch.ones(2, 64)}), "unmerged LoRA"),
    "a norm more": (
        {},
        {},
        add(model__layers__0__extra_norm__weight=torch.ones(64)),
        "extra_norm(.|\n)*compare",
    ),
    "a bias with the name of an old mask": ({}, {}, add(model__layers__0__attention__bias=torch.ones(64)), "biases"),
    "DataParallel": ({}, {}, wrap("module."), r"prefix 'module\.' is a wrapper"),
    "torch.compile": ({}, {}, wrap("_orig_mod."), r"prefix '_orig_mod\.' is a wrapper"),
    "peft": ({}, {}, wrap("base_model.model."), r"prefix 'base_model\.model\.' is a wrapper"),
}


@pytest.mark.parametrize(("sizes", "config", "edit", "message"), REFUSED.values(), ids=REFUSED)
def test_weights_without_a_place_are_refused_with_the_likely_cause(
    tmp_path: Path, sizes: dict[str, Any], config: dict[str, Any], edit: Edit | None, message: str
) -> None:
    folder = str(saved(tmp_path, edit=edit, config=config, **sizes))
    with pytest.raises(ModelError, match=message) as loaded:
        load_model(folder)
    # The same is found without reading weights.
    with pytest.raises(ModelError) as named:
        check_files(meta_model(load_config(folder)), folder)
    assert str(named.value) == str(loaded.value)


@pytest.mark.parametrize("model_type", SIZES)
def test_names_of_a_saved_model_have_their_places(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    check_files(meta_model(load_config(str(tmp_path))), str(tmp_path))


@pytest.mark.parametrize("arguments", [["inspect"], ["convert", "--keep-attention", "all", "--output", "student"]])
def test_commands_refuse_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "teacher", config={"attention_bias": False}, attention_bias=True)
    assert main([*arguments, str(folder)]) == 3
    assert "12 weights that have no place" in capsys.readouterr().err


def test_masks_that_old_releases_saved_pass_where_the_class_has_them(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(str(tmp_path)).config.model_type == "gpt2"


def test_buffers_that_old_releases_saved_pass(tmp_path: Path) -> None:
    edit = add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8), transformer__masked_bias=torch.ones(1))
    assert load_model(str(saved(tmp_path, edit=edit))).config.num_hidden_layers == 3


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantized_values_without_what_scales_them_are_refused(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = saved(tmp_path, edit=lambda found: found.update({name: found[name].to(dtype)}))
    with pytest.raises(ModelError, match=rf"stores 1 weights in a type of quantized values[\s\S]*{name} of {stored}"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="type of quantized values"):
        check_files(meta_model(load_config(str(folder))), str(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    def edit(found: dict[str, Tensor]) -> None:
        found["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    with pytest.raises(ModelError, match=r"NaN or infinite(.|\n)*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(saved(tmp_path, edit=edit)))


def test_a_stored_head_is_followed_where_the_config_ties_it(tmp_path: Path) -> None:
    folder = saved(tmp_path, config={"tie_word_embeddings": True})
    expected = tiny_model("llama")
    with pytest.warns(UserWarning, match="the head is untied"):
        config = load_config(str(folder))
    assert config.tie_word_embeddings is False
    with pytest.warns(UserWarning, match="the head is untied"):
        model = load_model(str(folder))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.config.tie_word_embeddings is False


def test_a_stored_head_that_equals_the_tied_embedding_passes(tmp_path: Path) -> None:
    def edit(found: dict[str, Tensor]) -> None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()

    folder = saved(tmp_path, edit=edit, config={"tie_word_embeddings": True})
    model = load_model(str(folder))
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    tensors = stored_tensors(folder)
    assert same_bytes(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not same_bytes(tensors["lm_head.weight"], tensors["model.norm.weight"])


def sharded(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    return folder


def cut_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:200])


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


def shard_twice(folder: Path) -> None:
    first, second = sorted(folder.glob("model-0*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)


def swapped_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    other = {names[0]: names[1], names[1]: names[0]}
    content["weight_map"] = {key: other.get(name, name) for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))


def index_missing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def variant_only(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    AutoModelForCausalLM.from_config(tiny_model("llama").config).save_pretrained(folder, variant="fp16")


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_index: r"index\.json is not JSON",
    index_without_map: "has no weight_map",
    index_outside: "names files outside its folder",
    shard_twice: "is stored twice",
    swapped_shards: "not in the file that it names",
    index_missing: r"holds no model\.safetensors and no model\.safetensors\.index\.json",
    variant_only: r"this is the variant 'fp16': rename it",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_shards_and_variants_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = sharded(tmp_path / "model")
    assert load_model(str(folder)).config.num_hidden_layers == 3
    damage(folder)
    with pytest.raises(ModelError, match=DAMAGES[damage]) as raised:
        load_model(str(folder))
    assert str(folder) in str(raised.value)
    shutil.rmtree(folder)
