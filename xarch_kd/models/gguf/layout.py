"""Layout of a model in GGUF: metadata and tensors under llama.cpp's names, and checks that nothing is left out.

The names are those of https://github.com/ggml-org/llama.cpp (`gguf-py/gguf/constants.py`); what each architecture
computes is read from its graphs (`src/models/`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError

Value = bool | int | float | str | list[int] | list[bool] | list[str] | list[float]
# Where the rotary pairs of a head lie in llama.cpp: dimensions 2i and 2i + 1, or i and i + half of the head, which is
# the order of transformers.
NEIGHBOURS, HALVES = "neighbours", "halves"

# Fields that do not change what a model computes: bookkeeping, initialization, training, choice of kernels. So do those
# with an underscore before them, and numbers of special tokens, which are the tokenizer's in GGUF.
INERT: Final = frozenset(
    {
        *("transformers_version", "architectures", "dtype", "model_type", "problem_type"),
        *("id2label", "label2id", "return_dict", "output_hidden_states", "output_attentions", "use_cache"),
        *("chunk_size_feed_forward", "initializer_range"),
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "pretraining_tp", "max_window_layers"),
        *("chunk_size", "mamba_chunk_size", "time_step_min", "time_step_max", "time_step_floor", "time_step_rank"),
        *("rescale_prenorm_residual", "residual_in_fp32", "output_router_logits", "router_aux_loss_coef"),
    }
)
# Of every Transformer.
SIZES: Final = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        "tie_word_embeddings",
    }
)


class TensorSource:
    """Weights of a model, each to be taken once; `left` holds those that no one took."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.left: dict[str, Tensor] = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        if model.config.get_text_config().tie_word_embeddings:
            self.left.pop("lm_head.weight", None)

    def take(self, name: str) -> Tensor:
        """Return a weight. Raises `ConversionError` if the model has none of this name."""
        if name not in self.left:
            raise ConversionError(
                "The model lacks a weight that its GGUF file needs.", asked=name, found=", ".join(sorted(self.left)[:4])
            )
        return self.left.pop(name)

    def take_if_there(self, name: str) -> Tensor | None:
        """Return a weight, or None if the model has none of this name."""
        return self.left.pop(name, None)


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """Architecture of llama.cpp for one model type of transformers.

    `carried` are the config's fields that metadata and tensors hold; `fixed` maps a field to the values at which
    llama.cpp computes the same; any other field of the class must be inert or at its default. `unsupported_reason`
    returns why a config does not fit, with the values of several fields taken together. `metadata` returns the
    architecture's own keys without prefix, `tensors` takes every weight from a source and returns them under
    llama.cpp's names.
    """

    architecture: str
    carried: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unsupported_reason: Callable[[Any], str | None] = lambda config: None
    metadata: Callable[[PreTrainedModel], dict[str, Value]]
    tensors: Callable[[PreTrainedModel, TensorSource], dict[str, Tensor]]

    def check_config(self, config: PreTrainedConfig) -> None:
        """Raise `ConversionError` naming every field of a config that this architecture has no place for.

        Warns of fields that the config's class does not have, which it does not read.
        """
        values, defaults = config.to_dict(), type(config)().to_dict()
        wrong, allowed, unknown = [], [], []
        for name, value in values.items():
            if name in INERT or name in self.carried or name.startswith("_") or name.endswith("_token_id"):
                continue
            if name not in defaults and name not in self.fixed:
                unknown.append(f"{name}: {value}")
                continue
            accepted = self.fixed.get(name, (defaults.get(name),))
            if not any(value == other for other in accepted):
                wrong.append(f"{name}: {value}")
                allowed.append(f"{name}: {' | '.join(map(str, accepted))}")
        reason = self.unsupported_reason(config)
        if wrong or reason is not None:
            raise ConversionError(
                f"llama.cpp's architecture {self.architecture} does not compute what this {config.model_type} does"
                + (f": {reason}." if reason is not None else "."),
                found=", ".join(wrong) or None,
                allowed=", ".join(allowed) or None,
                fix="keep the format of transformers, which vLLM and SGLang read, or train a student without it",
            )
        if unknown:
            warnings.warn(
                f"config fields that the class of {config.model_type} does not have are not carried: "
                + ", ".join(unknown),
                stacklevel=4,
            )


def pair_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Return rows [heads × head_dim, …] with the two dimensions of each rotary pair beside each other."""
    apart = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return apart.swapaxes(1, 2).reshape(rows.shape)


def head_dim(config: Any) -> int:
    """Return the dimensions of a head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def whole_heads(config: Any) -> str | None:
    """Return why a config whose heads are not the hidden size divided evenly has no place, or None."""
    size = head_dim(config)
    if size * config.num_attention_heads != config.hidden_size:
        return f"its heads have {size} dimensions, and llama.cpp takes hidden_size / num_attention_heads"
    return None


def transformer_metadata(model: PreTrainedModel) -> dict[str, Value]:
    """Return the metadata that every architecture with attention has, rotary positions included."""
    config: Any = model.config
    size = head_dim(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **rotary_metadata(model),
    }


def rotary_metadata(model: PreTrainedModel) -> dict[str, Value]:
    """Return the metadata of rotary positions. Raises `ConversionError` for a scaling that llama.cpp lacks."""
    config: Any = model.config
    frequencies = inverse_frequencies(model)
    if frequencies is None:
        return {}
    rope = config.rope_parameters
    kind, factor = rope.get("rope_type", "default"), float(rope.get("factor", 1.0))
    found: dict[str, Value] = {
        "rope.dimension_count": 2 * len(frequencies),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    if kind == "yarn":
        usual = {"attention_factor": 0.1 * math.log(factor) + 1.0, "mscale": None, "mscale_all_dim": None}
        unusual = [name for name, value in usual.items() if rope.get(name) not in (None, value)]
        if unusual or rope.get("truncate") is False:
            raise _unscaled(", ".join(f"{name}: {rope[name]}" for name in (unusual or ["truncate"])), rope)
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = float(rope[name])
        return found
    # Llama 3.1's scaling is a tensor of divisors, see `rotary_divisors`.
    if kind not in ("default", "llama3"):
        raise _unscaled(f"rope_type: {kind}", rope)
    return found


def rotary_divisors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensor by which llama.cpp divides each rotary frequency, if they are not plain."""
    config: Any = model.config
    rope, frequencies = config.rope_parameters, inverse_frequencies(model)
    if frequencies is None or rope.get("rope_type", "default") in ("linear", "yarn"):
        return {}
    count = len(frequencies)
    plain = float(rope["rope_theta"]) ** -(torch.arange(count, dtype=torch.float64) / count)
    divisors = plain / frequencies.double()
    if rope.get("rope_type", "default") == "default":
        if not torch.allclose(divisors, torch.ones_like(divisors), rtol=1e-5):
            raise _unscaled(f"divisors of frequencies {divisors[:4].tolist()}", rope)
        return {}
    return {"rope_freqs.weight": divisors.float()}


def inverse_frequencies(model: PreTrainedModel) -> Tensor | None:
    """Return the rotary frequencies of a model, one per pair of rotated dimensions; None if it has no positions."""
    rotary: Any = next((module for module in model.modules() if hasattr(module, "inv_freq")), None)
    # Made anew, since a model that was cast to a narrower dtype has rounded ones.
    return None if rotary is None else type(rotary)(model.config).inv_freq.cpu()


def _unscaled(what: str, rope: Mapping[str, Any]) -> ConversionError:
    return ConversionError(
        "llama.cpp has no metadata for these rotary positions.",
        asked=dict(rope),
        found=what,
        allowed="rope_type: default | linear | llama3 | yarn with its usual attention_factor",
    )
