"""GGUF files: what they hold beside plain weights gives the logits of the model they came from, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from xarch_kd.errors import ModelError
from xarch_kd.models.loading.gguf import gguf_config
from xarch_kd.models.loading.load import load_model
from xarch_kd.testing.tiny import tiny_model

gguf = pytest.importorskip("gguf", reason="files are written with the gguf package")

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE = {"rope_theta": 10000.0}
LINEAR = ROPE | {"rope_type": "linear", "factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OF_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
OF_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}


def metadata(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
    }


def write(
    path: Path, model: PreTrainedModel, architecture: str, changes: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Path:
    """Write a model of Llama's layout with its tokens; `changes` are the architecture's keys, None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("mistral" if model.config.model_type == "mistral" else "tiny")
    for key, value in (metadata(model) | changes).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    tokens = ["t", "1", "t1", *(f"x{index}" for index in range(model.config.vocab_size - 3))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t 1"])
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name, array = WHOLE.get(key), weight.float().numpy()
        if name is None:
            _, _, layer, *middle, kind = key.split(".")
            name = f"blk.{layer}.{PARTS['.'.join(middle)]}.{kind}"
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            array = interleaved(array, metadata(model)["attention.head_count" + ("_kv" if ".attn_k." in name else "")])
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Return rows in the order of llama.cpp, whose rotary pairs are neighbours and not halves."""
    return array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def frequencies(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the tensor through which a file of Llama 3.1 scales positions."""
    plain = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    return {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()}


CARRIED = {
    "plain": ("llama", "llama", {}, {}),
    "tied head": ("llama", "llama", {"tie_word_embeddings": True}, {}),
    "linear scaling": ("llama", "llama", {"rope_parameters": LINEAR}, OF_LINEAR),
    "an old linear scaling": ("llama", "llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "yarn": ("llama", "llama", {"rope_parameters": YARN}, OF_YARN),
    "yarn of qwen2": ("qwen2", "qwen2", {"rope_parameters": YARN}, OF_YARN),
    "llama 3.1's frequencies": ("llama", "llama", {"rope_parameters": LLAMA3}, {}),
    "attention biases": ("llama", "llama", {"attention_bias": True}, {}),
    "MLP biases": ("llama", "llama", {"mlp_bias": True}, {}),
    "heads of another size": ("llama", "llama", {"head_dim": 32}, {"attention.key_length": 32}),
    "heads of qwen3": ("qwen3", "qwen3", {}, {"attention.key_length": 16, "attention.value_length": 16}),
    "a Mistral without a window": ("mistral", "llama", {"sliding_window": None}, {"attention.sliding_window": 0}),
    "as many key heads": ("qwen2", "qwen2", {"num_key_value_heads": 4}, {"attention.head_count_kv": None}),
    "softcap 0": ("llama", "llama", {}, {"attn_logit_softcapping": 0.0, "expert_count": 0}),
}


@pytest.mark.parametrize(("family", "architecture", "sizes", "keys"), CARRIED.values(), ids=CARRIED)
def test_the_logits_are_those_of_the_model_it_came_from(
    tmp_path: Path, family: str, architecture: str, sizes: dict[str, Any], keys: dict[str, Any]
) -> None:
    model = tiny_model(family, **sizes)
    tensors = frequencies(model) if sizes.get("rope_parameters") is LLAMA3 else {}
    file = write(tmp_path / "tiny.gguf", model, architecture, keys, tensors)
    loaded = load_model(str(file))
    ids = torch.randint(2, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = loaded(ids).logits, model(ids).logits
    # Only llama3's original context is found by a search; all else is copied, so that logits agree to rounding.
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


REFUSED = {
    "longrope": ({}, {"rope.scaling.type": "longrope"}, {}, r"rope\.scaling\.type: longrope"),
    "an attention softcap": ({}, {"attn_logit_softcapping": 50.0}, {}, r"attn_logit_softcapping: 50"),
    "a final softcap": ({}, {"final_logit_softcapping": 30.0}, {}, r"final_logit_softcapping: 30"),
    "a window": ({}, {"attention.sliding_window": 8}, {}, r"attention\.sliding_window: 8"),
    "experts": ({}, {"expert_count": 8}, {}, r"expert_count: 8"),
    "a logit scale": ({}, {"logit_scale": 0.5}, {}, r"logit_scale: 0\.5"),
    "half of a head rotated": ({}, {"rope.dimension_count": 8}, {}, r"rope\.dimension_count: 8"),
    "values of another size": ({}, {"attention.value_length": 8}, {}, r"attention\.value_length: 8"),
    "no key heads": (
        {"num_key_value_heads": 4},
        {"attention.head_count_kv": None},
        {},
        r"no llama\.attention\.head_count",
    ),
    "an unknown tensor": ({}, {}, {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, r"blk\.0\.attn_sinks\.weight"),
    "frequencies of another kind": (
        {},
        {},
        {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)},
        r"rope_freqs\.weight",
    ),
    "two scalings": (
        {},
        OF_LINEAR,
        {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)},
        "scales rotary positions twice",
    ),
    "a layer more than it says": ({}, {"block_count": 2}, {}, r"blk\.2\."),
}


@pytest.mark.parametrize(("sizes", "keys", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_place_is_refused_before_weights_are_read(
    tmp_path: Path, sizes: dict[str, Any], keys: dict[str, Any], tensors: dict[str, np.ndarray], message: str
) -> None:
    file = write(tmp_path / "tiny.gguf", tiny_model("llama", **sizes), "llama", keys, tensors)
    with pytest.raises(ModelError, match=message):
        gguf_config(file)


@pytest.mark.parametrize("part", ["attn_q", "attn_output"])
def test_biases_that_the_class_cannot_hold_alone_are_refused(tmp_path: Path, part: str) -> None:
    biases = {f"blk.{layer}.{part}.bias": np.ones(64, np.float32) for layer in range(3)}
    with pytest.raises(ModelError, match=r"lacks 9 weights(.|\n)*bias"):
        load_model(str(write(tmp_path / "tiny.gguf", tiny_model("llama"), "llama", {}, biases)))
    with pytest.raises(ModelError, match=r"blk\.0\.attn_output\.bias"):
        outputs = {f"blk.{layer}.attn_output.bias": np.ones(64, np.float32) for layer in range(3)}
        gguf_config(write(tmp_path / "other.gguf", tiny_model("qwen2"), "qwen2", {}, outputs))


def test_metadata_that_is_not_known_is_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", tiny_model("llama"), "llama", {"new_feature": 3}, {})
    with pytest.warns(UserWarning, match=r"not carried: llama\.new_feature"):
        gguf_config(file)
