"""Sizes of token-mixing matrices, as factors and FLOPs, from a model without storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xarch_kd.taps.layout import Layout


@dataclass(frozen=True)
class MixingSize:
    """Sizes of `heads` matrices: `numbers` per token of their factors, `head_dim` of the products of one matrix entry.

    `query` and `key` are the sizes of queries and keys, or of C and B, of all heads or groups together.
    """

    heads: int
    numbers: int
    head_dim: int
    query: int
    key: int


def mixing_size(layout: Layout, layer: int) -> MixingSize | None:
    """Return the size of the mixing matrices of block `layer`, or None for a mixer that is not known here.

    Softmax attention is held as queries and keys, Mamba-2 as C, B, steps and decays, Mamba-1 as C, B and steps, the
    gated delta rule as queries, keys, β and decays.
    """
    config, mixer = layout.model.config.get_text_config(), layout.mixers[layer]
    kind = layout.mixer_kinds[layer]
    if kind == "attention":
        heads = number_of(config, "num_attention_heads", "n_head")
        head_dim = number_of(config, "head_dim") or layout.dim // max(heads, 1)
        keys = number_of(config, "num_key_value_heads") or heads
        found = MixingSize(heads, (heads + keys) * head_dim, head_dim, heads * head_dim, keys * head_dim)
    elif kind == "mamba2":
        heads, _, state, _ = mamba2_sizes(mixer)
        groups = number_of(mixer, "n_groups") * state
        found = MixingSize(heads, 2 * groups + 2 * heads, state, groups, groups)
    elif kind == "mamba":
        state = number_of(mixer, "ssm_state_size")
        channels = mixer.A_log.numel() // max(state, 1) if isinstance(mixer.A_log, Tensor) else 0
        found = MixingSize(channels, 2 * state + channels, state, state, state)
    elif kind == "gated_delta":
        heads, head_dim = number_of(mixer, "num_v_heads", "num_heads"), number_of(mixer, "head_k_dim")
        found = MixingSize(heads, 2 * heads * head_dim + 2 * heads, head_dim, heads * head_dim, heads * head_dim)
    else:
        return None
    return found if found.heads and found.head_dim else None


def mamba2_sizes(mixer: nn.Module) -> tuple[int, int, int, int]:
    """Return (heads, head_dim, state, chunk) of a Mamba-2 mixer; all classes of transformers use the same names."""
    return (
        number_of(mixer, "num_heads"),
        number_of(mixer, "head_dim"),
        number_of(mixer, "ssm_state_size"),
        number_of(mixer, "chunk_size"),
    )


def number_of(holder: Any, *names: str) -> int:
    """Return the first of these entries of a config or module that is a whole number, else 0."""
    found = next((getattr(holder, name) for name in names if isinstance(getattr(holder, name, None), int)), 0)
    return int(found)
