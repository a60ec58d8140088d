"""Configs of `mamba_ssm.MambaLMHeadModel` (https://github.com/state-spaces/mamba) and of the stock classes it equals.

Its network is Bamba's, or an equal GraniteMoeHybrid's, if it mixes attention, Mamba-2 mixers or MLPs, and otherwise
Mamba's or Mamba-2's. Its config has
no fields for the norms' epsilon (1e-5), the activation (silu) and scaled rotary positions, so models that need other
values are refused. Nothing of the package `mamba_ssm` is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import BambaConfig, Mamba2Config, MambaConfig, PreTrainedConfig

from xarch_kd.errors import ConversionError, ModelError, suggest
from xarch_kd.models.mamba_ssm.granitemoehybrid import equal_bamba_config

FORMAT = "mamba_ssm"
EPSILON = 1e-5
UNBOUNDED = (0.0, math.inf)
# The defaults of `mamba_ssm.models.config_mamba.MambaConfig`; it takes no other field.
FIELDS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
MAMBA1: dict[str, Any] = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "conv_bias": True,
    "bias": False,
}
MAMBA2: dict[str, Any] = {
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "chunk_size": 256,
    "dt_limit": UNBOUNDED,
    "conv_bias": True,
    "bias": False,
}
ATTENTION: dict[str, Any] = {
    "num_heads": None,
    "num_heads_kv": None,
    "head_dim": None,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0,
}
# mamba_ssm's name of a field -> that of Mamba's and Mamba-2's stock config.
SHARED: dict[str, str] = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
MAMBA1_NAMES = {**SHARED, "dt_rank": "time_step_rank"}
MAMBA2_NAMES = {**SHARED, "headdim": "head_dim", "ngroups": "n_groups", "chunk_size": "chunk_size"}
# Fields that a stock class supports at one value only.
FIXED: dict[str, dict[str, Any]] = {
    "Mamba1": {},
    "Mamba2": {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
    "attn_cfg": {
        "causal": True,
        "d_conv": 0,
        "mlp_dim": 0,
        "softmax_scale": None,
        "rotary_emb_interleaved": False,
    },
}
# Defaults of fields of `FIXED` in mamba_ssm that differ from the supported value.
UNWRITTEN = {"causal": False}
# Initialization of weights and choice of kernels; neither changes what a checkpoint computes.
IGNORED = (
    *("A_init_range", "conv_init", "dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale"),
    *("layer_idx", "process_group", "sequence_parallel", "use_fast_path", "use_mem_eff_path"),
)


def is_mamba_ssm(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a `config.json` are of mamba_ssm's form."""
    return "model_type" not in values and "d_model" in values and "n_layer" in values


def mamba_ssm_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return mamba_ssm's config of a model whose type is in `WRITERS`. Raises `ConversionError` for others."""
    if config.model_type not in WRITERS:
        raise ConversionError(
            f"A model of type {config.model_type} cannot be written in mamba_ssm's format: "
            "no model of that package equals it.",
            asked=f"model_type: {config.model_type}",
            allowed=", ".join(WRITERS),
            fix="convert the teacher with mixer: mamba2, or keep the format of transformers",
        )
    if config.model_type == "granitemoehybrid":
        config = equal_bamba_config(config)
    values: Any = config
    epsilon = getattr(values, "rms_norm_eps", None) or values.layer_norm_epsilon
    if epsilon != EPSILON:
        raise _unheld(
            f"norms with epsilon {epsilon:g}, and {EPSILON:g} is built in",
            found=f"epsilon {epsilon:g}",
            fix="use a teacher whose norms have 1e-5: xarch_kd.models.conversion.epsilon.with_epsilon(teacher, 1e-5) "
            "rescales one exactly, before it is converted; the norms inside mixers cannot be rescaled afterwards",
        )
    if values.hidden_act not in ("silu", "swish"):
        raise _unheld(
            "another activation than silu", found=f"hidden_act: {values.hidden_act}", fix="use a teacher with silu"
        )
    return {
        **FIELDS,
        "n_layer": values.num_hidden_layers,
        "d_model": values.hidden_size,
        "vocab_size": values.vocab_size,
        # Its default would pad the vocabulary.
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": bool(values.tie_word_embeddings),
        **WRITERS[config.model_type](config),
    }


def _unheld(what: str, *, found: str, fix: str) -> ConversionError:
    return ConversionError(
        f"mamba_ssm's format does not hold {what}.", found=found, fix=f"{fix}; or keep the format of transformers"
    )


def _bamba(config: PreTrainedConfig) -> dict[str, Any]:
    values: Any = config
    if values.mlp_bias:
        raise _unheld("biases of an MLP", found="mlp_bias: true", fix="use a teacher without them")
    head_dim = getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
    return {
        "d_intermediate": values.intermediate_size,
        # As in Bamba, whose residual stream has the dtype of its weights.
        "residual_in_fp32": False,
        "attn_layer_idx": list(values.attn_layer_indices or ()),
        "attn_cfg": {
            "causal": True,
            "num_heads": values.num_attention_heads,
            "num_heads_kv": values.num_key_value_heads,
            "head_dim": head_dim,
            "qkv_proj_bias": values.attention_bias,
            "out_proj_bias": values.attention_bias,
            **_rotary(values.rope_parameters, head_dim),
        },
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": values.mamba_d_state,
            "d_conv": values.mamba_d_conv,
            "expand": values.mamba_expand,
            "headdim": values.mamba_d_head,
            "ngroups": values.mamba_n_groups,
            "chunk_size": values.mamba_chunk_size,
            "conv_bias": values.mamba_conv_bias,
            "bias": values.mamba_proj_bias,
            **_limit(values.time_step_limit),
        },
    }


def _rotary(parameters: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    share = parameters.get("partial_rotary_factor", 1.0)
    if share == 0.0:
        return {"rotary_emb_dim": 0}
    if parameters["rope_type"] != "default":
        raise _unheld(
            "scaled rotary positions",
            found=f"rope_type: {parameters['rope_type']}",
            fix="use a teacher without rope scaling, or with its positions unscaled where texts are short enough",
        )
    return {"rotary_emb_dim": int(head_dim * share), "rotary_emb_base": parameters["rope_theta"]}


def _limit(limit: Any) -> dict[str, Any]:
    return {} if limit is None or tuple(limit) == UNBOUNDED else {"dt_limit": list(limit)}


def _mamba2(config: PreTrainedConfig) -> dict[str, Any]:
    values: Any = config
    mixer = {"layer": "Mamba2", **_written(config, MAMBA2_NAMES), **_limit(values.time_step_limit)}
    return {"residual_in_fp32": values.residual_in_fp32, "ssm_cfg": mixer}


def _mamba(config: PreTrainedConfig) -> dict[str, Any]:
    values: Any = config
    return {
        "residual_in_fp32": values.residual_in_fp32,
        "ssm_cfg": {"layer": "Mamba1", **_written(config, MAMBA1_NAMES)},
    }


def _written(config: PreTrainedConfig, names: Mapping[str, str]) -> dict[str, Any]:
    return {own: getattr(config, stock) for own, stock in names.items()}


WRITERS: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "bamba": _bamba,
    "granitemoehybrid": _bamba,
    "mamba2": _mamba2,
    "mamba": _mamba,
}


def stock_config(values: Mapping[str, Any], *, where: str) -> PreTrainedConfig:
    """Return the config of the stock class that equals a model of mamba_ssm's config.

    Sizes of a config with padding (`pad_vocab_size_multiple`) are those with it. Raises `ModelError` naming `where` for
    an unknown field and for a model that no stock class holds.
    """
    given = {**FIELDS, **values}
    mixer = dict(given["ssm_cfg"] or {})
    layer = mixer.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise _foreign(where, f"ssm_cfg.layer: {layer}", allowed="Mamba1, Mamba2")
    _check_fields(given, FIELDS, {}, where=where)
    _check_fields(mixer, MAMBA1 if layer == "Mamba1" else MAMBA2, FIXED[layer], where=f"{where}: ssm_cfg")
    if not given["rms_norm"]:
        raise _foreign(where, "rms_norm: false", allowed="true: no stock class has these mixers with LayerNorm")
    multiple = given["pad_vocab_size_multiple"]
    shared = {
        "vocab_size": -(-given["vocab_size"] // multiple) * multiple,
        "hidden_size": given["d_model"],
        "num_hidden_layers": given["n_layer"],
        "tie_word_embeddings": given["tie_embeddings"],
        "hidden_act": "silu",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if given["attn_layer_idx"] or given["d_intermediate"]:
        return _stock_bamba(given, layer, {**MAMBA2, **mixer}, shared, where)
    shared |= {"layer_norm_epsilon": EPSILON, "residual_in_fp32": given["residual_in_fp32"]}
    if layer == "Mamba1":
        return _stock_mamba({**MAMBA1, **mixer}, shared, where)
    return _stock_mamba2({**MAMBA2, **mixer}, shared, where)


def _check_fields(given: Mapping[str, Any], known: Mapping[str, Any], fixed: Mapping[str, Any], *, where: str) -> None:
    """Raise `ModelError` for an unknown field, or a value that no stock class supports."""
    for name, value in given.items():
        if name not in (*known, *fixed, *IGNORED):
            raise ModelError(
                f"The config of {where} has a field that mamba_ssm does not have.{suggest(name, known)}",
                found=f"{name}: {value}",
                allowed=", ".join((*known, *fixed)),
            )
    for name, allowed in fixed.items():
        value = given.get(name, UNWRITTEN.get(name, allowed))
        if value != allowed:
            raise _foreign(where, f"{name}: {value}", allowed=f"{name}: {allowed}")


def _foreign(where: str, found: str, *, allowed: str) -> ModelError:
    return ModelError(
        f"The config of {where} describes a model of mamba_ssm that no stock class of transformers equals.",
        found=found,
        allowed=allowed,
        fix="load it with mamba_ssm itself; its taps can be read there too",
    )


def _whole(value: float, name: str, where: str) -> int:
    if int(value) != value:
        raise _foreign(where, f"{name}: {value}", allowed="a whole number")
    return int(value)


def _stock_bamba(
    given: Mapping[str, Any], layer: str, mixer: Mapping[str, Any], shared: Mapping[str, Any], where: str
) -> PreTrainedConfig:
    if layer != "Mamba2":
        raise _foreign(where, "Mamba1 beside attention or an MLP", allowed="Mamba2 beside them")
    if not given["d_intermediate"]:
        raise _foreign(where, "attention without an MLP", allowed="d_intermediate > 0")
    attention = {**ATTENTION, **(given["attn_cfg"] or {})}
    if given["attn_layer_idx"]:
        _check_fields(given["attn_cfg"], ATTENTION, FIXED["attn_cfg"], where=f"{where}: attn_cfg")
    heads = attention["num_heads"] or 1
    head_dim = attention["head_dim"] or given["d_model"] // heads
    expand = _whole(mixer["expand"], "expand", where)
    return BambaConfig(
        # `head_dim` is no field of Bamba's, but its attention reads it and it survives saving.
        **{**shared, "head_dim": head_dim},
        architectures=["BambaForCausalLM"],
        intermediate_size=given["d_intermediate"],
        num_attention_heads=heads,
        num_key_value_heads=attention["num_heads_kv"] or heads,
        attention_bias=bool(attention["qkv_proj_bias"] or attention["out_proj_bias"]) and bool(given["attn_layer_idx"]),
        mlp_bias=False,
        rms_norm_eps=EPSILON,
        rope_parameters=_stock_rotary(attention["rotary_emb_dim"], attention["rotary_emb_base"], head_dim),
        attn_layer_indices=list(given["attn_layer_idx"]),
        mamba_n_heads=expand * given["d_model"] // mixer["headdim"],
        mamba_d_head=mixer["headdim"],
        mamba_n_groups=mixer["ngroups"],
        mamba_d_state=mixer["d_state"],
        mamba_d_conv=mixer["d_conv"],
        mamba_expand=expand,
        mamba_chunk_size=mixer["chunk_size"],
        mamba_conv_bias=mixer["conv_bias"],
        mamba_proj_bias=mixer["bias"],
        time_step_limit=tuple(mixer["dt_limit"]),
    )


def _stock_rotary(rotated: int, base: float, head_dim: int) -> dict[str, Any]:
    if not rotated:
        return {"rope_type": "proportional", "rope_theta": base, "partial_rotary_factor": 0.0}
    share = rotated / head_dim
    # The classes take the whole part of share × width, which rounding may have put just below.
    while int(head_dim * share) < rotated:
        share = math.nextafter(share, 1.0)
    return {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}


def _stock_mamba2(mixer: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> PreTrainedConfig:
    read = _read(mixer, MAMBA2_NAMES, where)
    return Mamba2Config(
        **shared,
        **read,
        architectures=["Mamba2ForCausalLM"],
        num_heads=read["expand"] * shared["hidden_size"] // mixer["headdim"],
        time_step_limit=tuple(mixer["dt_limit"]),
    )


def _stock_mamba(mixer: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> PreTrainedConfig:
    return MambaConfig(**shared, **_read(mixer, MAMBA1_NAMES, where), architectures=["MambaForCausalLM"])


def _read(mixer: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    read = {stock: mixer[own] for own, stock in names.items()}
    return read | {"expand": _whole(mixer["expand"], "expand", where)}
