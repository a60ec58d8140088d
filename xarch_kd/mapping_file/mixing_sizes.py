"""How large a token-mixing matrix is, as factors and in work, from a config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xarch_kd.taps.layout import Layout


@dataclass(frozen=True)
class MixingSize:
    """`heads` matrices, `numbers` a token that their factors have, `width` of the products that give one entry."""

    heads: int
    numbers: int
    width: int


def mixing_size(layout: Layout, layer: int) -> MixingSize | None:
    """Return the size of the mixing matrices of block `layer`, or None for a mixer that is not known here.

    Softmax attention is held as queries and keys, Mamba-2 as C, B, steps and decays, Mamba-1 as C, B and steps.
    """
    config = layout.model.config.get_text_config()
    kind = layout.mixer_kinds[layer]
    if kind == "attention":
        heads = number_of(config, "num_attention_heads", "n_head")
        width = number_of(config, "head_dim") or layout.width // max(heads, 1)
        keys = number_of(config, "num_key_value_heads") or heads
        return MixingSize(heads, (heads + keys) * width, width)
    if kind == "mamba2":
        heads, _, state, _ = mamba2_sizes(config)
        groups = number_of(config, "mamba_n_groups", "n_groups") or 1
        return MixingSize(heads, 2 * groups * state + 2 * heads, state)
    if kind == "mamba":
        channels, state = number_of(config, "intermediate_size"), number_of(config, "state_size")
        return MixingSize(channels, 2 * state + channels, state)
    return None


def mamba2_sizes(config: Any) -> tuple[int, int, int, int]:
    """(heads, head_dim, state, chunk) under the names of Bamba or of Mamba-2."""
    return (
        number_of(config, "mamba_n_heads", "num_heads"),
        number_of(config, "mamba_d_head", "head_dim"),
        number_of(config, "mamba_d_state", "state_size"),
        number_of(config, "mamba_chunk_size", "chunk_size"),
    )


def number_of(config: Any, *names: str) -> int:
    """Return the first of these entries of a config that is a whole number, else 0."""
    found = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), 0)
    return int(found)
