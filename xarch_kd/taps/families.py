"""Table of model families: attribute paths of their modules, in the same form as a user's `paths`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from xarch_kd.errors import TapError, UsageError, suggest

# Prefix of the model types of students converted in place.
IN_PLACE_PREFIX = "xarch_kd_"
PATH_NAMES = ("blocks", "mixer", "mlp", "embedding", "final_norm", "head")


# A path or a config attribute, for every block or by the kind of the block's mixer (missing kinds: none).
ByKind = str | Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute paths of one model type.

    `blocks`, `embedding`, `final_norm` and `head` are relative to the causal language model, the others to a block.
    `mixers` are (path, kind) alternatives; the first that a block has is its mixer. A block that mixes tokens twice
    (Falcon-H1, and Zamba's blocks around a shared Transformer) has the recurrent mixer here; use `paths` for the other.

    `mixer_output` and `mlp_output` name the module whose output is added to the residual stream if that is not the
    mixer or MLP itself (a norm or dropout after it); `mixer_scale` and `mlp_scale` name the config field of its
    multiplier, by default `residual_multiplier` if the config has it. `experts` is the path of experts whose output is
    added to the MLP's: with them no module returns `mlp_output`. `block_returns` is the return value of a block's
    forward: the residual stream, alone or first in a tuple (of two, or of three), or a pair of which it is the sum;
    None means unknown: it is determined by a trial run.
    """

    blocks: str
    mixers: tuple[tuple[str, str | None], ...]
    mlp: str | None
    embedding: str | None
    final_norm: str | None
    head: str | None = "lm_head"
    mixer_output: ByKind | None = None
    mlp_output: ByKind | None = None
    mixer_scale: ByKind | None = None
    mlp_scale: str | None = None
    experts: str | None = None
    block_returns: Literal["tensor", "tuple", "triple", "pair"] | None = "tensor"


ATTENTION = ("self_attn", "attention")
LLAMA = Family(
    blocks="model.layers",
    mixers=(ATTENTION,),
    mlp="mlp",
    embedding="model.embed_tokens",
    final_norm="model.norm",
)
SANDWICH = replace(LLAMA, mixer_output="post_attention_layernorm", mlp_output="post_feedforward_layernorm")
MAMBA = Family(
    blocks="backbone.layers",
    mixers=(("mixer", "mamba"),),
    mlp=None,
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
)
BAMBA = replace(
    LLAMA,
    mixers=(ATTENTION, ("mamba", "mamba2")),
    mlp="feed_forward",
    final_norm="model.final_layernorm",
    block_returns="tuple",
)
QWEN3_NEXT = replace(LLAMA, mixers=(ATTENTION, ("linear_attn", "gated_delta")))
LFM2 = replace(
    LLAMA,
    mixers=(ATTENTION, ("conv", "short_convolution")),
    mlp="feed_forward",
    final_norm="model.embedding_norm",
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "gemma": LLAMA,
    "olmo": LLAMA,
    "cohere": LLAMA,
    "gpt_oss": LLAMA,
    "phi3": replace(LLAMA, mixer_output="resid_attn_dropout", mlp_output="resid_mlp_dropout"),
    # Mixer and MLP share a dropout module, so its output does not identify either.
    "phi": replace(LLAMA, final_norm="model.final_layernorm"),
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "olmo2": SANDWICH,
    "olmo3": SANDWICH,
    "gpt2": Family(
        blocks="transformer.h",
        mixers=(("attn", "attention"),),
        mlp="mlp",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        mixers=(("attention", "attention"),),
        mlp="mlp",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        # Its name changed between releases of transformers; the model has the current one.
        head=None,
        mixer_output="post_attention_dropout",
        mlp_output="post_mlp_dropout",
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        mixers=(ATTENTION,),
        # Its two layers belong to the block itself.
        mlp=None,
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
    ),
    "bamba": BAMBA,
    "falcon_h1": replace(BAMBA, mixers=(("mamba", "mamba2"),), mixer_scale="ssm_out_multiplier"),
    "jamba": replace(BAMBA, mixers=(ATTENTION, ("mamba", "mamba")), block_returns="tensor"),
    "granitemoehybrid": replace(
        LLAMA,
        mixers=(ATTENTION, ("mamba", "mamba2")),
        mlp="shared_mlp",
        experts="block_sparse_moe",
    ),
    "zamba": replace(
        LLAMA,
        mixers=(("mamba_decoder.mamba", "mamba"), ("mamba", "mamba")),
        mlp=None,
        final_norm="model.final_layernorm",
    ),
    "zamba2": replace(
        LLAMA,
        mixers=(("mamba_decoder.mamba", "mamba2"), ("mamba", "mamba2")),
        mlp=None,
        final_norm="model.final_layernorm",
    ),
    # A block is a mixer, an MLP or experts; the last two are of the kind `other`.
    "nemotron_h": replace(
        LLAMA,
        mixers=(("mixer", None),),
        mlp=None,
        embedding="model.embeddings",
        final_norm="model.norm_f",
    ),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN3_NEXT,
    "olmo_hybrid": replace(
        QWEN3_NEXT,
        mixer_output={"attention": "post_attention_layernorm"},
        mlp_output={"attention": "post_feedforward_layernorm"},
    ),
    "kimi_linear": replace(LLAMA, mixers=(("self_attn", None),)),
    "minimax": replace(
        LLAMA,
        mixers=(("self_attn", None),),
        mixer_scale={"attention": "full_attn_beta_factor", "lightning": "linear_attn_beta_factor"},
        mlp_scale="mlp_beta_factor",
    ),
    "recurrent_gemma": replace(
        LLAMA, mixers=(("temporal_block", None),), mlp="mlp_block", final_norm="model.final_norm"
    ),
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "lfm3": replace(LFM2, mixer_output="post_operator_norm", mlp_output="post_ffn_norm"),
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": replace(MAMBA, mixers=(("mixer", "mamba2"),)),
    "rwkv": Family(
        blocks="rwkv.blocks",
        mixers=(("attention", "wkv"),),
        mlp="feed_forward",
        embedding="rwkv.embeddings",
        final_norm="rwkv.ln_out",
        head="head",
        block_returns="triple",
    ),
}


def family_of(model_type: str, paths: Mapping[str, str | None] | object | None = None) -> Family:
    """Return the module paths of `model_type`; `paths` (a mapping or an object with those attributes) has priority.

    A mixer path may list alternatives, `self_attn|mamba`, for a hybrid. Raises TapError for a type outside the table
    without paths, UsageError for paths that are incomplete or have an unknown key.
    """
    if paths is not None:
        return _family_from_paths(paths)
    teacher = model_type.removeprefix(IN_PLACE_PREFIX)
    if teacher != model_type and teacher in FAMILIES:
        return replace(FAMILIES[teacher], mixers=tuple((path, None) for path, _ in FAMILIES[teacher].mixers))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=3, cutoff=0.5)
    raise TapError(
        f"The inner modules of a model of type '{model_type}' are not known.",
        asked=model_type,
        found=f"nearest known types: {', '.join(near)}" if near else "no known type with a similar name",
        allowed=", ".join(sorted(FAMILIES)),
        fix="name its parts in the mapping file, beside `model:`, with the attribute names that print(model) shows: "
        "`paths: {blocks: model.layers, mixer: self_attn, mlp: mlp, embedding: model.embed_tokens, "
        "final_norm: model.norm, head: lm_head}` (mixer and mlp start at a block; blocks and mixer are required)",
    )


def _family_from_paths(paths: Mapping[str, str | None] | object) -> Family:
    if isinstance(paths, Mapping):
        for name in paths:
            if name not in PATH_NAMES:
                raise UsageError(
                    f"paths: unknown key.{suggest(str(name), PATH_NAMES)}", asked=name, allowed=", ".join(PATH_NAMES)
                )
        given = {name: paths.get(name) for name in PATH_NAMES}
    else:
        given = {name: getattr(paths, name, None) for name in PATH_NAMES}
    blocks, mixer = given["blocks"], given["mixer"]
    if not blocks or not mixer:
        raise UsageError(
            "paths: both blocks and mixer must be given.",
            found=", ".join(f"{name}: {path}" for name, path in given.items() if path) or "nothing",
            fix="e.g. `paths: {blocks: model.layers, mixer: self_attn}`",
        )
    return Family(
        blocks=blocks,
        mixers=tuple((path.strip(), None) for path in mixer.split("|")),
        mlp=given["mlp"],
        embedding=given["embedding"],
        final_norm=given["final_norm"],
        head=given["head"],
        block_returns=None,
    )
