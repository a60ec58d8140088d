"""The model types whose token-mixing matrices are read, and masks for them."""

from __future__ import annotations

import torch

from xarch_kd.taps.families import FAMILIES

# An RWKV has no adapter.
READABLE = [family for family in FAMILIES if family != "rwkv"]
# One family per kind of tap: attention, and each adapter of a recurrent mixer.
HYBRIDS = ("bamba", "qwen3_5_text", "kimi_linear", "jamba", "recurrent_gemma", "minimax", "lfm3", "zamba2")


def padded(input_ids, model_type):
    """Padded on the left, but for the family whose recurrence takes such padding for tokens."""
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    return mask.flip(1) if model_type == "recurrent_gemma" else mask
