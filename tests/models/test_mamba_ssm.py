"""Folders in mamba_ssm's format: contents, exact round trip, refused models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GraniteMoeHybridConfig, PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError, ModelError, UsageError
from xarch_kd.files import CHECKSUM_FILE
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.convert import convert, plan_conversion
from xarch_kd.models.loading.load import load_config, load_model, load_tokenizer, read_student_config
from xarch_kd.models.mamba_ssm.config import is_mamba_ssm, mamba_ssm_config, stock_config
from xarch_kd.models.mamba_ssm.format import WEIGHTS, export_mamba_ssm, import_mamba_ssm
from xarch_kd.testing.tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

BAMBA: dict[str, Any] = {"rms_norm_eps": 1e-5}
ROTARY = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}
NO_ROTARY = {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("bamba", BAMBA),
    "tied": ("bamba", {**BAMBA, "tie_word_embeddings": True}),
    "biases": ("bamba", {**BAMBA, "attention_bias": True, "mamba_proj_bias": True}),
    "wide heads": ("bamba", {**BAMBA, "head_dim": 32, "mamba_expand": 2}),
    "whole rotary": ("bamba", {**BAMBA, "rope_parameters": ROTARY}),
    "no rotary": ("bamba", {**BAMBA, "rope_parameters": NO_ROTARY}),
    "no attention": ("bamba", {**BAMBA, "attn_layer_indices": []}),
    "bounded steps": ("bamba", {**BAMBA, "time_step_limit": (0.1, 2.0), "mamba_n_groups": 2}),
    "MLP of a whole multiple": ("bamba", {**BAMBA, "intermediate_size": 256}),
    "mamba2": ("mamba2", {}),
    "mamba2 of one group": ("mamba2", {"n_groups": 1, "time_step_limit": (0.1, 2.0)}),
    "mamba2 tied": ("mamba2", {"tie_word_embeddings": True, "use_bias": True}),
    "mamba": ("mamba", {}),
    "mamba tied": ("mamba", {"tie_word_embeddings": True, "use_bias": True, "time_step_rank": 3}),
}
# GraniteMoeHybrid students, by the teacher that they are converted from; the package's format holds the equal Bamba.
GRANITES: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid": ("llama", {"rms_norm_eps": 1e-5, "attention_bias": True}),
    "granitemoehybrid of wide heads": ("mistral", {"rms_norm_eps": 1e-5, "head_dim": 32}),
    "granitemoehybrid with multipliers": ("granite", {"rms_norm_eps": 1e-5}),
    "granitemoehybrid tied": ("granite", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
}


def model_of(name: str) -> PreTrainedModel:
    if name in GRANITES:
        model_type, overrides = GRANITES[name]
        return convert(tiny_model(model_type, **overrides), replace=[0], check=False)
    model_type, overrides = CASES[name]
    return tiny_model(model_type, **overrides)


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_is_exact(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    folder = export_mamba_ssm(model, tmp_path / "student")
    back = import_mamba_ssm(folder)
    assert type(back) is type(model)
    assert logits(back).equal(logits(model))
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert [key for key, value in back.state_dict().items() if not value.equal(expected[key])] == []
    again = mamba_ssm_config(back.config)
    assert again == mamba_ssm_config(model.config) == json.loads((folder / "config.json").read_text())
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(back.config, token) for token in tokens] == [getattr(model.config, token) for token in tokens]


@pytest.mark.parametrize("name", GRANITES)
def test_a_granitemoehybrid_comes_back_as_the_equal_bamba(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    assert model.config.model_type == "granitemoehybrid"
    back = import_mamba_ssm(export_mamba_ssm(model, tmp_path / "student"))
    assert back.config.model_type == "bamba"
    assert back.config.layers_block_type == model.config.layer_types
    found, expected = logits(back), logits(model)
    if GRANITES[name][0] == "granite":
        # The multipliers are folded into the weights, which unties the head.
        head: Any = back.get_output_embeddings()
        assert back.get_input_embeddings().weight is not head.weight
        assert float((found - expected).abs().max()) <= logits_tolerance(float(expected.abs().max()), 3, found.dtype)
    else:
        assert found.equal(expected)


def test_a_granitemoehybrid_without_positions_or_with_experts() -> None:
    teacher = tiny_config("smollm3", no_rope_layers=[0, 0, 0, 0], rms_norm_eps=1e-5)
    assert mamba_ssm_config(plan_conversion(teacher, replace=[1]).config)["attn_cfg"]["rotary_emb_dim"] == 0
    experts = GraniteMoeHybridConfig(num_hidden_layers=2, num_local_experts=4)
    with pytest.raises(ConversionError, match=r"num_local_experts: 4(.|\n)*fix: +keep the format"):
        mamba_ssm_config(experts)


def test_what_is_written_is_for_the_package_and_for_the_way_back(tmp_path: Path) -> None:
    folder = export_mamba_ssm(model_of("tied"), tmp_path / "student", tiny_tokenizer())
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", WEIGHTS, "generation_config.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    assert AutoTokenizer.from_pretrained(folder)("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    state = torch.load(folder / WEIGHTS, weights_only=True)
    # 96 channels of an MLP take 128 there, up before gate; 4 heads and twice 2 of 16 channels are one projection.
    assert state["backbone.layers.0.mlp.fc1.weight"].shape == (256, 64)
    assert state["backbone.layers.1.mixer.in_proj.weight"].shape == (128, 64)
    own = model_of("tied").state_dict()
    assert state["backbone.layers.0.mlp.fc1.weight"][:96].equal(own["model.layers.0.feed_forward.up_proj.weight"])
    assert state["backbone.layers.0.mlp.fc1.weight"][128:224].equal(own["model.layers.0.feed_forward.gate_proj.weight"])
    assert state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()


def test_a_tied_model_that_comes_back_is_tied(tmp_path: Path) -> None:
    for name in ("tied", "mamba2 tied", "mamba tied"):
        back = import_mamba_ssm(export_mamba_ssm(model_of(name), tmp_path / name))
        assert back.get_parameter("lm_head.weight") is back.get_input_embeddings().weight, name
        assert all(parameter.requires_grad for parameter in back.parameters())


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path: Path) -> None:
    model = model_of("bamba").bfloat16()
    folder = export_mamba_ssm(model, tmp_path / "student")
    assert import_mamba_ssm(folder).dtype == torch.bfloat16
    wide = import_mamba_ssm(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    name = "model.layers.0.mamba.in_proj.weight"
    assert wide.get_parameter(name).equal(model.get_parameter(name).float())


def test_padding_that_was_trained_is_kept(tmp_path: Path) -> None:
    folder = export_mamba_ssm(model_of("bamba"), tmp_path / "student")
    (folder / CHECKSUM_FILE).unlink()
    state = torch.load(folder / WEIGHTS, weights_only=True)
    # One of three is zero: the channel still adds nothing.
    state["backbone.layers.2.mlp.fc1.weight"][100] = 1.0
    state["backbone.layers.2.mlp.fc1.weight"][228] = 1.0
    torch.save(state, folder / WEIGHTS)
    back = import_mamba_ssm(folder)
    assert back.config.to_dict()["intermediate_size"] == 96
    assert logits(back).equal(logits(model_of("bamba")))
    state["backbone.layers.2.mlp.fc2.weight"][:, 100] = 1.0
    torch.save(state, folder / WEIGHTS)
    back = import_mamba_ssm(folder)
    assert back.config.to_dict()["intermediate_size"] == 128
    assert float((logits(back) - logits(model_of("bamba"))).abs().max()) > 0.1


def test_a_bias_in_one_projection_of_attention_alone(tmp_path: Path) -> None:
    folder = export_mamba_ssm(model_of("biases"), tmp_path / "student")
    (folder / CHECKSUM_FILE).unlink()
    state = torch.load(folder / WEIGHTS, weights_only=True)
    del state["backbone.layers.1.mixer.out_proj.bias"]
    torch.save(state, folder / WEIGHTS)
    change(folder, lambda config: config["attn_cfg"].update(out_proj_bias=False))
    model = model_of("biases")
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.o_proj.bias").zero_()
    assert logits(import_mamba_ssm(folder)).equal(logits(model))


@pytest.mark.parametrize(
    ("model_type", "overrides", "message", "remedy"),
    [
        ("bamba", {"rms_norm_eps": 1e-6}, "epsilon 1e-06", "with_epsilon"),
        ("mamba2", {"layer_norm_epsilon": 1e-6}, "epsilon 1e-06", "with_epsilon"),
        ("bamba", {**BAMBA, "hidden_act": "gelu"}, "hidden_act: gelu", "silu"),
        ("bamba", {**BAMBA, "mlp_bias": True}, "mlp_bias", "without them"),
        (
            "bamba",
            {**BAMBA, "rope_parameters": {**ROTARY, "rope_type": "linear", "factor": 2.0}},
            "rope_type: linear",
            "without rope scaling",
        ),
        ("llama", {}, "model_type: llama", "mixer: mamba2"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    model_type: str, overrides: Mapping[str, Any], message: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        export_mamba_ssm(tiny_model(model_type, **overrides), tmp_path / "student")
    assert remedy in str(caught.value.fix)
    assert list(tmp_path.iterdir()) == []


# As published checkpoints have it: fields left out, and a vocabulary that is padded.
PUBLISHED = {"d_model": 64, "n_layer": 2, "vocab_size": 97, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}


def test_fields_that_are_left_out_have_the_defaults_of_the_package() -> None:
    config: Any = stock_config(PUBLISHED, where="here")
    assert (config.model_type, config.vocab_size, config.time_step_rank) == ("mamba", 104, 4)
    assert (config.state_size, config.expand, config.conv_kernel, config.tie_word_embeddings) == (16, 2, 4, True)
    config = stock_config({**PUBLISHED, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}, where="here")
    assert (config.model_type, config.vocab_size, config.num_heads) == ("mamba2", 112, 2)
    assert (config.state_size, config.head_dim, config.n_groups, config.chunk_size) == (128, 64, 1, 256)
    assert not config.use_bias and config.use_conv_bias
    attention = {"num_heads": 4, "causal": True, "rotary_emb_dim": 8}
    hybrid = {**PUBLISHED, "d_intermediate": 96, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [1]}
    config = stock_config({**hybrid, "attn_cfg": attention}, where="here")
    assert (config.num_key_value_heads, config.head_dim, config.attention_bias) == (4, 16, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("head_dim", [24, 48, 49, 96, 112])
def test_every_share_of_rotary_channels_comes_back(head_dim: int) -> None:
    for rotated in range(2, head_dim + 1, 2):
        attention = {"num_heads": 2, "head_dim": head_dim, "causal": True, "rotary_emb_dim": rotated}
        values = {**PUBLISHED, "d_intermediate": 96, "attn_layer_idx": [1], "attn_cfg": attention}
        config = stock_config({**values, "ssm_cfg": {"layer": "Mamba2"}}, where="here")
        assert mamba_ssm_config(config)["attn_cfg"]["rotary_emb_dim"] == rotated


MHA = {"num_heads": 4, "causal": True}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"rms_norm": False}, "rms_norm: false"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"ssm_cfg": {"expand": 1.5}}, "expand: 1.5"),
        ({"ssm_cfg": {"d_stat": 5}}, r"Did you mean 'd_state'"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim: True"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate: True"),
        ({"d_layers": 3}, "d_layers: 3"),
        ({"d_intermediate": 96}, "Mamba1 beside"),
        ({"attn_layer_idx": [0], "ssm_cfg": {"layer": "Mamba2"}, "attn_cfg": MHA}, "attention without an MLP"),
        ({"attn_cfg": {**MHA, "d_conv": 4}}, "d_conv: 4"),
        ({"attn_cfg": {**MHA, "softmax_scale": 0.5}}, r"softmax_scale: 0\.5"),
        ({"attn_cfg": {"num_heads": 4}}, "causal: False"),
        ({"attn_cfg": {**MHA, "rotary_emb_interleaved": True}}, "rotary_emb_interleaved"),
    ],
)
def test_what_no_stock_class_equals_is_refused(changes: Mapping[str, Any], found: str) -> None:
    values = {**PUBLISHED, **changes}
    if "attn_cfg" in changes and "attn_layer_idx" not in changes:
        values |= {"attn_layer_idx": [1], "d_intermediate": 96, "ssm_cfg": {"layer": "Mamba2"}}
    with pytest.raises(ModelError, match=found):
        stock_config(values, where="here")


def test_whose_config_it_is() -> None:
    assert is_mamba_ssm(PUBLISHED)
    assert not is_mamba_ssm({**PUBLISHED, "model_type": "mamba"})
    assert not is_mamba_ssm(tiny_config("mamba").to_dict())


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    folder = export_mamba_ssm(model_of("mamba"), tmp_path / "student")
    (folder / CHECKSUM_FILE).unlink()
    torch.save({"backbone.embedding.weight": Trap(tmp_path / "sprung")}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="nothing else in it is run"):
        import_mamba_ssm(folder)
    assert not (tmp_path / "sprung").exists()


def test_weights_that_are_not_those_of_the_config(tmp_path: Path) -> None:
    folder = export_mamba_ssm(model_of("bamba"), tmp_path / "student")
    (folder / CHECKSUM_FILE).unlink()
    state: dict[str, Tensor] = torch.load(folder / WEIGHTS, weights_only=True)

    def given(**changes: Tensor | None) -> None:
        changed = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
        torch.save({name: value for name, value in changed.items() if value is not None}, folder / WEIGHTS)

    given(backbone__norm_f__weight=None)
    with pytest.raises(ModelError, match=r"lacks 1 weights(.|\n)*backbone\.norm_f\.weight"):
        import_mamba_ssm(folder)
    given(backbone__extra=torch.ones(1))
    with pytest.raises(ModelError, match=r"1 weights that have no place(.|\n)*backbone\.extra"):
        import_mamba_ssm(folder)
    given(backbone__layers__1__mixer__in_proj__weight=torch.ones(120, 64))
    with pytest.raises(ModelError, match=r"1 weights of another shape(.|\n)*in_proj\.weight \(120, 64\)"):
        import_mamba_ssm(folder)
    given(backbone__layers__1__mixer__conv1d__extra_bias=torch.ones(1), backbone__lora_A=torch.ones(1))
    with pytest.raises(ModelError, match=r"2 weights that have no place(.|\n)*unmerged LoRA"):
        load_model(str(folder))
    torch.save({f"module.{name}": value for name, value in state.items()}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"prefix 'module\.' is a wrapper"):
        load_model(str(folder))
    given(backbone__norm_f__weight=torch.full((64,), float("nan")))
    with pytest.raises(ModelError, match="NaN"):
        import_mamba_ssm(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be read"):
        import_mamba_ssm(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"no {WEIGHTS}"):
        import_mamba_ssm(folder)


def test_a_stock_folder_is_not_imported(tmp_path: Path) -> None:
    model_of("mamba").save_pretrained(tmp_path / "stock")
    with pytest.raises(ModelError, match="not in mamba_ssm's format"):
        import_mamba_ssm(tmp_path / "stock")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="already holds something"):
        export_mamba_ssm(model_of("mamba"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_is_loaded_as_the_stock_model_that_it_equals(tmp_path: Path) -> None:
    folder = export_mamba_ssm(model_of("tied").bfloat16(), tmp_path / "student", tiny_tokenizer())
    assert load_config(str(folder)).model_type == read_student_config(str(folder)).model_type == "bamba"
    assert load_config(str(folder)).bos_token_id == 0
    model = load_model(str(folder))
    assert (type(model).__name__, model.dtype) == ("BambaForCausalLM", torch.float32)
    assert load_model(str(folder), dtype=None).dtype == torch.bfloat16
    assert load_tokenizer(str(folder))("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


def test_a_config_of_the_hub_is_asked_for_as_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_hub(*_: object, **__: object) -> tuple[dict[str, Any], dict[str, Any]]:
        return dict(PUBLISHED), {}

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", of_the_hub)
    with pytest.raises(ModelError, match="--local-dir"):
        load_config("state-spaces/mamba-130m")
