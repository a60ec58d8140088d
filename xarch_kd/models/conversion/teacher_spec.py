"""Teacher specifications for conversion, read from configs, and refusals of teachers without a stock class.

A family enters `SPECS` only with a test that its converted logits equal the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedConfig

from xarch_kd.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Sizes of an attention, and the `epsilon` of its norm, which comes before it unless `norm_after`."""

    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    epsilon: float
    norm_after: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherSpec(AttentionSpec):
    """Specification of a Transformer with rotary attention and a gated MLP.

    `norm_offset` is added to every norm weight (gemma: 1). `attention_scale` multiplies q·k, `residual_scale` what a
    mixer or MLP adds to the residual stream, `embedding_scale` the embedding, `logit_scale` the logits.
    `rope_parameters` always has the rotated fraction of a head. `rotary_layers[i]` is False where block i has no
    position encoding. `output_bias` is that of o_proj. `query_key_norm` is the axis over which queries and keys are
    normalized, or None. With `norm_after` a block's two norms follow its attention and MLP instead of preceding them.
    """

    model_type: str
    layers: int
    intermediate: int
    vocabulary: int
    activation: str
    rope_parameters: dict[str, Any]
    rotary_layers: tuple[bool, ...]
    input_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float
    logit_scale: float = 1.0
    query_key_norm: Literal["head", "width"] | None = None

    @property
    def is_scaled(self) -> bool:
        """True if embedding and head are scaled differently, so that a folded student cannot tie them."""
        return self.embedding_scale != 1.0 or self.logit_scale != 1.0

    @property
    def is_folded(self) -> bool:
        """True if a student without multipliers needs scaled weights."""
        return self.is_scaled or self.residual_scale != 1.0 or self.attention_scale != self.head_dim**-0.5


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Refusal of a model family: the reason, and the nearest supported alternative."""

    reason: str
    instead: str


def teacher_spec(config: PreTrainedConfig) -> TeacherSpec:
    """Return the spec of a teacher's config. Raises `ConversionError` with the reason and an alternative."""
    refusal = REFUSALS.get(config.model_type)
    if refusal is not None:
        raise ConversionError(
            f"A teacher of type {config.model_type} cannot become a stock hybrid student: {refusal.reason}.",
            asked=f"model_type: {config.model_type}",
            allowed=", ".join(SPECS),
            fix=or_in_place(config.model_type, refusal.instead),
        )
    if config.model_type not in SPECS:
        raise ConversionError(
            f"A teacher of type {config.model_type} cannot become a stock hybrid student: "
            "its conversion is not known to be exact.",
            asked=f"model_type: {config.model_type}",
            allowed=", ".join(SPECS),
            fix="build a fresh student (student: {config: FOLDER}) and align it, which needs no conversion",
        )
    _refuse_window(config)
    return SPECS[config.model_type](config)


def or_in_place(model_type: str, fix: str) -> str:
    """Return `fix`, preceded by conversion in the teacher's own class if the family supports it."""
    from xarch_kd.models.in_place.teachers import IN_PLACE_TEACHERS

    if model_type not in IN_PLACE_TEACHERS:
        return fix
    return f"target: in_place puts new mixers into the teacher's own class, which needs this package to load; or {fix}"


def _refuse_window(config: PreTrainedConfig) -> None:
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("qwen2", "qwen3", "smollm3") and not getattr(config, "use_sliding_window", False):
        window = None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        window = None
    if window is None or window >= config.max_position_embeddings:
        return
    raise ConversionError(
        f"The teacher attends through a sliding window of {window} tokens, and no stock hybrid class has one.",
        asked=f"sliding_window: {window}, max_position_embeddings: {config.max_position_embeddings}",
        allowed="a teacher without a window",
        fix=or_in_place(
            config.model_type,
            f"if no sequence is longer than {window} tokens, the window changes nothing: set sliding_window to null "
            f"and max_position_embeddings to {window} in a copy of the teacher's config.json",
        ),
    )


def _llama_like(config: PreTrainedConfig) -> TeacherSpec:
    """Return the spec read from Llama's config names; each family then replaces what differs."""
    values: Any = config
    head_dim = getattr(config, "head_dim", None) or values.hidden_size // values.num_attention_heads
    attention_bias = bool(getattr(config, "attention_bias", False))
    return TeacherSpec(
        model_type=config.model_type,
        layers=values.num_hidden_layers,
        width=values.hidden_size,
        intermediate=values.intermediate_size,
        heads=values.num_attention_heads,
        key_value_heads=values.num_key_value_heads or values.num_attention_heads,
        head_dim=head_dim,
        vocabulary=values.vocab_size,
        activation=values.hidden_act,
        epsilon=values.rms_norm_eps,
        rope_parameters=dict(values.rope_parameters),
        rotary_layers=(True,) * values.num_hidden_layers,
        input_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        tied=bool(values.tie_word_embeddings),
        attention_scale=head_dim**-0.5,
    )


def _full_rotary(config: PreTrainedConfig) -> TeacherSpec:
    """Return Llama's spec for a family that ignores `partial_rotary_factor`."""
    spec = _llama_like(config)
    return replace(spec, rope_parameters={**spec.rope_parameters, "partial_rotary_factor": 1.0})


def _mistral(config: PreTrainedConfig) -> TeacherSpec:
    return replace(_full_rotary(config), input_bias=False, output_bias=False, mlp_bias=False)


def _qwen2(config: PreTrainedConfig) -> TeacherSpec:
    return replace(_full_rotary(config), input_bias=True, output_bias=False, mlp_bias=False)


def _phi3(config: PreTrainedConfig) -> TeacherSpec:
    spec = replace(_llama_like(config), input_bias=False, output_bias=False, mlp_bias=False)
    original = getattr(config, "original_max_position_embeddings", None)
    if spec.rope_parameters.get("rope_type") == "longrope" and original is not None:
        rope = {"original_max_position_embeddings": original, **spec.rope_parameters}
        return replace(spec, rope_parameters=rope)
    return spec


def _granite(config: PreTrainedConfig) -> TeacherSpec:
    values: Any = config
    return replace(
        _full_rotary(config),
        embedding_scale=values.embedding_multiplier,
        residual_scale=values.residual_multiplier,
        attention_scale=values.attention_multiplier,
        logit_scale=1.0 / values.logits_scaling,
    )


def _smollm3(config: PreTrainedConfig) -> TeacherSpec:
    values: Any = config
    return replace(_full_rotary(config), rotary_layers=tuple(bool(value) for value in values.no_rope_layers))


def _gemma(config: PreTrainedConfig) -> TeacherSpec:
    spec = _full_rotary(config)
    return replace(spec, mlp_bias=False, norm_offset=1.0, embedding_scale=spec.width**0.5)


def _qwen3(config: PreTrainedConfig) -> TeacherSpec:
    return replace(_full_rotary(config), mlp_bias=False, query_key_norm="head")


def _olmo2(config: PreTrainedConfig) -> TeacherSpec:
    return replace(_full_rotary(config), mlp_bias=False, query_key_norm="width", norm_after=True)


SPECS: dict[str, Callable[[PreTrainedConfig], TeacherSpec]] = {
    "llama": _full_rotary,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "granite": _granite,
    "smollm3": _smollm3,
    "gemma": _gemma,
    "qwen3": _qwen3,
    "olmo2": _olmo2,
}

_FRESH = "build a fresh student (student: {config: FOLDER}) and align it, which needs no conversion"

REFUSALS: dict[str, Refusal] = {
    "gemma2": Refusal(
        reason="it has norms before and after each sub-block, soft-capped attention and logits, and a sliding window",
        instead="a Gemma 1 teacher converts exactly; or " + _FRESH,
    ),
    "gemma3_text": Refusal(
        reason="it has norms before and after each sub-block, query and key norms, a window and two rotary bases",
        instead="a Gemma 1 teacher converts exactly; or " + _FRESH,
    ),
    "gemma3": Refusal(
        reason="it reads images too, and its text model has norms before and after each sub-block and a sliding window",
        instead="a Gemma 1 teacher converts exactly; or " + _FRESH,
    ),
    "gpt2": Refusal(
        reason="it adds learned positions to its embedding and uses LayerNorm, and no stock hybrid class has either",
        instead=_FRESH,
    ),
    "gpt_neox": Refusal(
        reason="its LayerNorms have biases with no place, and mostly its attention and MLP read one input in parallel",
        instead=_FRESH,
    ),
}
