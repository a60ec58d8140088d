"""Helpers for tests of traces: available taps, tolerances, counts of module calls."""

from __future__ import annotations

import torch

RECURRENT = ("mamba", "mamba2", "falcon_mamba")
WITHOUT_MLP = (*RECURRENT, "opt", "zamba", "zamba2", "nemotron_h")
BLOCK_TAPS = ("hidden", "mixer_input", "mixer_output", "mlp_output")
# One addition of three float32 terms in another order, at the size of the residual stream.
ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def taps_of(model_type: str) -> list[str]:
    blocks = [tap for tap in BLOCK_TAPS if not (tap == "mlp_output" and model_type in WITHOUT_MLP)]
    return ["embedding", *blocks, "head_input"]


def close(actual, expected):
    return (actual - expected).abs().max().item() <= ROUNDINGS * max(1.0, expected.abs().max().item())


def count_calls(modules):
    """Return a live count of the forward calls of each module."""
    calls = [0] * len(modules)

    def counted(index, forward):
        def count(*args, **kwargs):
            calls[index] += 1
            return forward(*args, **kwargs)

        return count

    for index, module in enumerate(modules):
        module.forward = counted(index, module.forward)
    return calls
