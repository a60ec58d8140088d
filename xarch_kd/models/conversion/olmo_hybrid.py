"""Conversion target OLMo Hybrid: OLMo 2's attention blocks, or gated delta mixers in blocks with norms in front.

An attention block of both classes is x + norm(attention(x)), then x + norm(mlp(x)). A recurrent block of OLMo Hybrid
is x + mixer(norm(x)), then x + mlp(norm(x)): its MLP is the teacher's but its norms are placed differently, so a
replaced block is near the teacher's only as far as a norm acts like a constant. `olmo_hybrid_norms` chooses that
constant from `ActivationStats`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import OlmoHybridConfig, PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.activation_stats import ActivationStats
from xarch_kd.models.conversion.bamba import CONVOLUTION, attention_state, copied_fields, projections
from xarch_kd.models.conversion.qwen3_5 import delta_fields
from xarch_kd.models.conversion.rotary import rotary_parameters
from xarch_kd.models.conversion.teacher_spec import TeacherSpec
from xarch_kd.models.conversion.weights import BlockWeights, TeacherWeights, widened


def olmo_hybrid_unsupported_reason(spec: TeacherSpec) -> str | None:
    """Return why OLMo Hybrid cannot hold a teacher, or None."""
    if not spec.norm_after:
        return "its norms precede attention and MLP, where those of OLMo Hybrid's attention blocks follow them"
    if spec.query_key_norm != "width":
        return "it does not norm queries and keys over all heads together, as OLMo Hybrid does"
    if spec.mlp_bias:
        return "its MLP has biases, and OLMo Hybrid's has no place for them"
    return None


def olmo_hybrid_config(spec: TeacherSpec, kept: Sequence[int], teacher: PreTrainedConfig) -> OlmoHybridConfig:
    """Return the config of a student that keeps attention in the blocks `kept`.

    The class requires blocks of both kinds. If every block is kept, one more is appended that adds nothing. Raises
    `ConversionError` if none is kept.
    """
    if len(kept) == 0:
        raise ConversionError(
            "OLMo Hybrid requires at least one block with attention.",
            asked="no block keeps its attention",
            fix="keep one, e.g. keep_attention: last 1",
        )
    kinds = ["full_attention" if index in kept else "linear_attention" for index in range(spec.layers)]
    if len(kept) == spec.layers:
        kinds.append("linear_attention")
    return OlmoHybridConfig(
        **copied_fields(spec, teacher) | {"num_hidden_layers": len(kinds)},
        **delta_fields(spec),
        architectures=["OlmoHybridForCausalLM"],
        tie_word_embeddings=spec.tied,
        # Without rotary parameters the class leaves positions out.
        rope_parameters=rotary_parameters(spec, kept),
        layer_types=kinds,
        # Else β lies in [0, 2], and a mixer whose β starts at its middle swaps a key's value instead of averaging.
        linear_allow_neg_eigval=False,
    )


def olmo_hybrid_state(weights: TeacherWeights, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return all weights of a student except the mixers and norms of the replaced blocks."""
    spec = weights.spec
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    state["lm_head.weight"] = weights.head
    for index in range(spec.layers):
        block, place = weights.block(index), f"model.layers.{index}"
        mlp = {"gate_proj": block.gate, "up_proj": block.up, "down_proj": block.down}
        state |= projections(f"{place}.mlp", mlp, with_bias=False)
        if index in kept:
            state |= attention_state(f"{place}.self_attn", block, spec)
            state[f"{place}.post_attention_layernorm.weight"] = block.mixer_norm
            state[f"{place}.post_feedforward_layernorm.weight"] = block.mlp_norm
            for name, norm in (("q_norm", block.query_norm), ("k_norm", block.key_norm)):
                assert norm is not None
                state[f"{place}.self_attn.{name}.weight"] = norm
    return state | (_inert_block(weights) if len(kept) == spec.layers else {})


def olmo_hybrid_mixer(place: str, mixer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a gated delta mixer, given under the names of `delta_mixers.py`, under OLMo's names."""
    named = {
        "q_proj.weight": mixer["query"],
        "k_proj.weight": mixer["key"],
        "v_proj.weight": mixer["value"],
        "g_proj.weight": mixer["gate"],
        "b_proj.weight": mixer["beta"],
        "a_proj.weight": mixer["step"],
        "conv1d.weight": mixer["convolution"],
        "dt_bias": mixer["dt_bias"],
        "A_log": mixer["A_log"],
        "o_norm.weight": mixer["norm"],
        "o_proj.weight": mixer["output"],
    }
    return {f"{place}.linear_attn.{name}": value for name, value in named.items()}


def olmo_hybrid_norms(place: str, block: BlockWeights, stats: ActivationStats) -> dict[str, Tensor]:
    """Return the norms and the MLP's last projection of a replaced block.

    The norm before the MLP multiplies by the usual size of the input of the teacher's MLP, so that the MLP's input is
    nearly the same; the teacher's norm after it becomes a constant scale of `down`, by the usual size of its output.
    """
    ones = widened(block.mlp_norm).new_ones(block.mlp_norm.shape)
    down = widened(block.down.weight) * (widened(block.mlp_norm) / stats.mlp_output_size)[:, None]
    return {
        f"{place}.input_layernorm.weight": ones * stats.mixer_input_size,
        f"{place}.post_attention_layernorm.weight": ones * stats.mlp_input_size,
        f"{place}.mlp.down_proj.weight": down,
    }


def _inert_block(weights: TeacherWeights) -> dict[str, Tensor]:
    """Return the weights of an appended recurrent block whose mixer and MLP return zero."""
    spec, place = weights.spec, f"model.layers.{weights.spec.layers}"
    like = weights.block(0)
    inner = spec.heads * spec.head_dim
    wide = like.gate.weight.new_zeros(inner, spec.width)
    narrow = like.gate.weight.new_zeros(spec.heads, spec.width)
    mixer = dict.fromkeys(("query", "key", "value", "gate"), wide) | dict.fromkeys(("beta", "step"), narrow)
    mixer |= {"convolution": wide.new_zeros(3 * inner, 1, CONVOLUTION), "norm": wide.new_ones(spec.head_dim)}
    mixer |= {"dt_bias": wide.new_zeros(spec.heads), "A_log": wide.new_zeros(spec.heads), "output": wide.T}
    mlp = {"gate_proj": like.gate, "up_proj": like.up, "down_proj": like.down.scaled(0.0)}
    ones = wide.new_ones(spec.width)
    norms = {f"{place}.{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")}
    return olmo_hybrid_mixer(place, mixer) | projections(f"{place}.mlp", mlp, with_bias=False) | norms
