"""The writer for Bamba, the stock Transformers class of Llama-shaped blocks with attention or Mamba-2 mixers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import BambaConfig, PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.facts import TeacherFacts
from xarch_kd.models.mixers import MixerShape
from xarch_kd.models.weights import TeacherWeights

CONVOLUTION = 4
# Of 64, 128 and 256 the fastest in the PyTorch path of transformers on a CPU; the kernels take any power of two.
CHUNK = 64


def mixer_head_dim(facts: TeacherFacts) -> tuple[int, int]:
    """Return (expansion, channels per mixer head), the smallest that hold the teacher's heads.

    Bamba's mixer is `expansion × width` channels wide, an integer, split evenly over the heads. A head of the teacher
    that is narrower fills the first channels of its mixer head and leaves the others zero.
    """
    for expansion in range(1, 65):
        channels, rest = divmod(expansion * facts.width, facts.heads)
        if rest == 0 and channels >= facts.head_dim:
            return expansion, channels
    raise ConversionError(
        "No whole multiple of the teacher's width splits evenly over its heads, as Bamba's mixer needs.",
        found=f"width {facts.width}, {facts.heads} heads of {facts.head_dim}",
    )


def bamba_config(facts: TeacherFacts, kept: Sequence[int], teacher: PreTrainedConfig) -> BambaConfig:
    """Return the config of a Bamba student that keeps attention in the blocks `kept`.

    It is built field by field: a teacher's dict may carry keys (quantisation, code) that a student must not have.
    Raises `ConversionError` if the kept blocks do not agree on whether they use rotary positions.
    """
    expansion, channels = mixer_head_dim(facts)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings")
    copied: dict[str, Any] = {name: getattr(teacher, name) for name in names}
    # Not a field of Bamba's config class, but its attention reads it and it survives saving.
    copied["head_dim"] = facts.head_dim
    return BambaConfig(
        **copied,
        architectures=["BambaForCausalLM"],
        vocab_size=facts.vocabulary,
        tie_word_embeddings=facts.tied and not facts.is_scaled,
        hidden_size=facts.width,
        intermediate_size=facts.intermediate,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.key_value_heads,
        hidden_act=facts.activation,
        rms_norm_eps=facts.epsilon,
        attention_dropout=getattr(teacher, "attention_dropout", 0.0),
        attention_bias=facts.input_bias or facts.output_bias,
        mlp_bias=facts.mlp_bias,
        rope_parameters=_rope(facts, kept),
        attn_layer_indices=list(kept),
        mamba_expand=expansion,
        mamba_n_heads=facts.heads,
        mamba_n_groups=facts.heads,
        mamba_d_head=channels,
        mamba_d_state=facts.head_dim,
        mamba_d_conv=CONVOLUTION,
        mamba_chunk_size=CHUNK,
        mamba_conv_bias=True,
        mamba_proj_bias=True,
    )


def _rope(facts: TeacherFacts, kept: Sequence[int]) -> dict[str, Any]:
    """Return the student's rotary parameters; Bamba's own default would rotate half of each head."""
    rotary = {facts.rotary_layers[index] for index in kept}
    if rotary == {True, False}:
        without = [index for index in kept if not facts.rotary_layers[index]]
        raise ConversionError(
            "The kept blocks mix attention with and without rotary positions, which Bamba has one switch for.",
            found=f"blocks without rotary positions: {without} of {list(kept)}",
            fix="keep only blocks with them, or only blocks without: "
            f"{[index for index in range(facts.layers) if facts.rotary_layers[index]]} or "
            f"{[index for index in range(facts.layers) if not facts.rotary_layers[index]]}",
        )
    if rotary == {False}:
        # In the shared rotary utilities this leaves every frequency zero, so that no channel is rotated.
        theta = facts.rope_parameters["rope_theta"]
        return {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": 0.0}
    return dict(facts.rope_parameters)


def mixer_shape(config: BambaConfig) -> MixerShape:
    """Return the sizes of the mixers of a config that `bamba_config` made."""
    sizes: Any = config
    return MixerShape(
        width=config.hidden_size,
        heads=sizes.mamba_n_heads,
        channels=sizes.mamba_d_head,
        state=sizes.mamba_d_state,
        convolution=sizes.mamba_d_conv,
    )


def bamba_state(weights: TeacherWeights, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return every weight of a Bamba student but those of its mixers, under Bamba's names.

    Tensors that need no fold are the teacher's own; whoever trains them copies them first.
    """
    state = {"model.embed_tokens.weight": weights.embedding, "model.final_layernorm.weight": weights.final_norm}
    state["lm_head.weight"] = weights.head
    for index in range(weights.facts.layers):
        block, place = weights.block(index), f"model.layers.{index}"
        state[f"{place}.input_layernorm.weight"] = block.mixer_norm
        state[f"{place}.pre_ff_layernorm.weight"] = block.mlp_norm
        named = {"feed_forward.gate_proj": block.gate, "feed_forward.up_proj": block.up}
        named["feed_forward.down_proj"] = block.down
        biased = dict.fromkeys(named, weights.facts.mlp_bias)
        if index in kept:
            attention = {"q": block.query, "k": block.key, "v": block.value, "o": block.output}
            named |= {f"self_attn.{name}_proj": projection for name, projection in attention.items()}
            has_bias = weights.facts.input_bias or weights.facts.output_bias
            biased |= {f"self_attn.{name}_proj": has_bias for name in attention}
        for name, projection in named.items():
            state[f"{place}.{name}.weight"] = projection.weight
            if biased[name]:
                # Bamba has one switch for the four attention biases; one that the teacher lacks is zero.
                missing = projection.weight.new_zeros(projection.weight.shape[0])
                state[f"{place}.{name}.bias"] = missing if projection.bias is None else projection.bias
    return state
