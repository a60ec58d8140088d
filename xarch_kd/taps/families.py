"""Where the parts of each model family are: one visible table, and the same language for `paths` given by a user."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from xarch_kd.errors import TapError, UsageError, suggest

PATH_NAMES = ("blocks", "mixer", "mlp", "embedding", "final_norm", "head")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute paths of one model type.

    `blocks`, `embedding`, `final_norm` and `head` start at the causal language model; the others start at a block.
    `mixers` are (path, kind) alternatives, of which each block has exactly one. `mixer_output` and `mlp_output` name
    the module whose output joins the residual sum where that is not the mixer or MLP itself (a norm or dropout after
    it). `block_returns` is what a block's forward returns; None means that it is not known and must be tried.
    """

    blocks: str
    mixers: tuple[tuple[str, str | None], ...]
    mlp: str | None
    embedding: str | None
    final_norm: str | None
    head: str | None = "lm_head"
    mixer_output: str | None = None
    mlp_output: str | None = None
    block_returns: Literal["tensor", "tuple"] | None = "tensor"


LLAMA = Family(
    blocks="model.layers",
    mixers=(("self_attn", "attention"),),
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

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "gemma": LLAMA,
    "olmo": LLAMA,
    "phi3": replace(LLAMA, mixer_output="resid_attn_dropout", mlp_output="resid_mlp_dropout"),
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
        # Its name changed between releases of transformers; the model knows it.
        head=None,
        mixer_output="post_attention_dropout",
        mlp_output="post_mlp_dropout",
    ),
    "bamba": replace(
        LLAMA,
        mixers=(("self_attn", "attention"), ("mamba", "mamba2")),
        mlp="feed_forward",
        final_norm="model.final_layernorm",
        block_returns="tuple",
    ),
    "mamba": MAMBA,
    "mamba2": replace(MAMBA, mixers=(("mixer", "mamba2"),)),
}


def family_of(model_type: str, paths: Mapping[str, str | None] | object | None = None) -> Family:
    """Return where the parts of `model_type` are; `paths` (a mapping or an object with those attributes) wins.

    A mixer path may give alternatives, `self_attn|mamba`, for a hybrid. Raises TapError for a type outside the table
    when there are no paths, UsageError for paths that are incomplete or have a foreign key.
    """
    if paths is not None:
        return _family_from_paths(paths)
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
