"""Export to GGUF: the file gives the student's logits by llama.cpp's graphs; what it cannot hold is refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from xarch_kd.errors import ConversionError, UsageError
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.gguf.write import export_gguf
from xarch_kd.models.loading.load import load_model
from xarch_kd.testing.recurrent import recurrent_model
from xarch_kd.testing.tiny import LLAMA3, PARTIAL, tiny_model

pytest.importorskip("gguf", reason="files are written with the gguf package")
from tests.models.llama_cpp_graphs import Graph

IDS = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(0))
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


UNCLAMPED = {"time_step_limit": (0.0, math.inf)}
# What makes the recurrent models of other tests fit.
FITTING: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": PARTIAL,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    },
    "granitemoehybrid": UNCLAMPED
    | {
        "mamba_proj_bias": False,
        "position_embedding_type": "rope",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
}


def model_of(family: str, **sizes: Any) -> PreTrainedModel:
    if family not in FITTING:
        model = tiny_model(family, **sizes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mixer.D"):
                    parameter.add_(torch.arange(len(parameter)) / 4)
        return model
    return recurrent_model(family, seed=0, **{**FITTING[family], **sizes})


def logits(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(IDS).logits[0].double().numpy()


def assert_same_logits(path: Path, model: PreTrainedModel) -> None:
    expected, found = logits(model), Graph(path).logits(IDS[0].tolist())
    largest = float(np.abs(expected).max())
    assert np.abs(found - expected).max() <= logits_tolerance(largest, model.config.num_hidden_layers, torch.float32)


HELD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with heads of another size": ("llama", {"head_dim": 32}),
    "llama with linear positions": ("llama", {"rope_parameters": LINEAR}),
    "llama with positions of 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "mamba2": ("mamba2", {}),
    "mamba2 without a bias of the convolution": ("mamba2", {"use_conv_bias": False, "tie_word_embeddings": True}),
    "gated delta in blocks by interval": ("qwen3_5_text", {}),
    "gated delta in listed blocks, as many keys as values": (
        "qwen3_5_text",
        {
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
        },
    ),
    "hybrid": ("granitemoehybrid", {}),
    "hybrid without positions": ("granitemoehybrid", {"position_embedding_type": None, "mamba_conv_bias": False}),
}


@pytest.mark.parametrize(("family", "sizes"), HELD.values(), ids=HELD)
def test_llama_cpps_graph_gives_the_logits(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    model = model_of(family, **sizes)
    assert_same_logits(export_gguf(model, tmp_path / "student.gguf").path, model)


def test_a_converted_student(tmp_path: Path) -> None:
    student = convert(tiny_model("llama"), mixer="gated_delta", target="qwen3_5", keep_attention=[1])
    written = export_gguf(student, tmp_path / "student.gguf")
    assert written.architecture == "qwen35"
    assert_same_logits(written.path, student)
    # Its queries are scaled to 1e-7 of the teacher's, which is below the range of float16.
    with pytest.raises(ConversionError, match=r"F16 cannot hold the numbers of blk\.1\.attn_q\.weight(.|\n)*bf16"):
        export_gguf(student, tmp_path / "other.gguf", dtype="f16")
    assert not (tmp_path / "other.gguf").exists()


READ = {"llama": {"rope_parameters": YARN}, "qwen2": {}, "qwen3": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("family", READ)
def test_transformers_reads_the_file_back(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, **READ[family])
    loaded = load_model(str(export_gguf(model, tmp_path / "student.gguf").path))
    expected = logits(model)
    largest = float(np.abs(expected).max())
    assert np.abs(logits(loaded) - expected).max() <= logits_tolerance(largest, 3, torch.float32)


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Return blocks of 32 numbers rounded to multiples of their largest / 127, the multiple's size to float16."""
    blocks = weight.reshape(-1, 32)
    size = blocks.abs().amax(dim=1, keepdim=True) / 127
    steps = torch.where(size > 0, blocks / size, 0.0)
    # Half away from zero.
    whole = torch.sign(steps) * torch.floor(steps.abs() + 0.5)
    return (whole * size.half().float()).reshape(weight.shape)


ROUNDED = {"f16": lambda weight: weight.half().float(), "bf16": lambda weight: weight.bfloat16().float(), "q8_0": q8_0}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("family", ["qwen2", "mamba2"])
def test_a_narrower_type_rounds_matrices_alone(tmp_path: Path, family: str, dtype: Any) -> None:
    """The file's logits are those of the student whose matrices are rounded, so that nothing else is lost."""
    model = model_of(family)
    written = export_gguf(model, tmp_path / "student.gguf", dtype=dtype)
    assert (written.dtype, written.widened) == (dtype, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(ROUNDED[dtype](parameter))
            assert parameter.ndim == 2 or "conv1d" in name or parameter.ndim == 1
    assert_same_logits(written.path, model)
    kinds = Graph(written.path).kinds
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["token_embd.weight"] == dtype.upper()


def test_rows_that_are_no_multiple_of_a_block_are_wider(tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=80)
    written = export_gguf(model, tmp_path / "student.gguf", dtype="q8_0")
    assert written.widened == 3
    assert Graph(written.path).kinds["blk.0.ffn_down.weight"] == "F16"
    assert export_gguf(model.bfloat16(), tmp_path / "own.gguf").dtype == "bf16"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bamba": ("bamba", {}, r"no architecture for a model of type bamba: it is read as granitehybrid(.|\n)*gated_delta"),
    "a family that is not known": ("opt", {}, r"no architecture for a model of type opt(.|\n)*allowed: llama, "),
    "a part of each head rotated": ("llama", {"rope_parameters": PARTIAL}, "it rotates a part of each head"),
    "dynamic positions": ("llama", {"rope_parameters": DYNAMIC}, "rope_type: dynamic"),
    "another activation": ("llama", {"hidden_act": "relu"}, r"hidden_act: relu\n *allowed: +hidden_act: silu"),
    "a window": ("mistral", {"sliding_window": 8}, "sliding_window: 8"),
    "biases of qwen3": ("qwen3", {"attention_bias": True}, "attention_bias: True"),
    "positions left out elsewhere": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, r"no_rope_layers: \[1, 0, 1, 0\]"),
    "a head of gemma": ("gemma", {"tie_word_embeddings": False}, "its head is not its embedding"),
    "heads of granite": ("granite", {"head_dim": 32}, "its heads have 32 dimensions"),
    "biases of mamba2": ("mamba2", {"use_bias": True}, "use_bias: True"),
    "narrow mixers": ("mamba2", {"expand": 1, "num_heads": 4}, r"expand: 1\n *allowed: +expand: 2"),
    "a clamped step": ("mamba2", {"time_step_limit": (0.01, 1.0)}, "time_step_limit"),
    "values of another size": (
        "qwen3_5_text",
        {"linear_value_head_dim": 6},
        "keys have 8 dimensions and their values",
    ),
    "biases of the hybrid": (
        "granitemoehybrid",
        {"mamba_proj_bias": True, "mamba_expand": 1, "mamba_n_heads": 4},
        r"mamba_expand: 1, (.|\n)*mamba_proj_bias: True",
    ),
    "experts": ("granitemoehybrid", {"num_local_experts": 2, "num_experts_per_tok": 1}, "num_local_experts: 2"),
}


@pytest.mark.parametrize(("family", "sizes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, family: str, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        export_gguf(model_of(family, **sizes), tmp_path / "student.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_config_field_that_is_not_known_is_reported(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.update({"logit_softcap": 30.0})
    with pytest.warns(UserWarning, match=r"not carried(.|\n)*logit_softcap: 30"):
        export_gguf(model, tmp_path / "student.gguf")


def test_a_weight_without_a_place_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(ConversionError, match=r"no place for some(.|\n)*layers\.0\.self_attn\.sinks"):
        export_gguf(model, tmp_path / "student.gguf")


def test_a_file_that_exists_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "student.gguf"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"student\.gguf exists"):
        export_gguf(tiny_model("llama"), file)
    assert file.read_text() == "mine"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package 'gguf'(.|\n)*xarch_kd\[gguf\]"):
        export_gguf(tiny_model("llama"), tmp_path / "other.gguf")
