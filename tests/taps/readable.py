"""Model types with token-mixing matrices, and masks for them."""

from __future__ import annotations

import torch

from xarch_kd.taps.families import FAMILIES

# An RWKV has no adapter.
READABLE = [family for family in FAMILIES if family != "rwkv"]
# One family per kind of tap: attention, and each adapter of a recurrent mixer.
HYBRIDS = ("bamba", "qwen3_5_text", "kimi_linear", "jamba", "recurrent_gemma", "minimax", "lfm3", "zamba2")


def padded(input_ids, model_type):
    """Return a mask with left padding, but right padding for the family whose recurrence ignores the mask."""
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    return mask.flip(1) if model_type == "recurrent_gemma" else mask
