"""Activation statistics of a teacher's blocks, measured on random tokens; no text is needed.

A gated delta mixer has no biases. In trained models the input of a block's attention has a mean that all tokens share:
on SmolLM2-135M-Instruct, the best multiple of the projection on the mean over random tokens is between 0.67 and 1.03 on
text, with a standard deviation of 0.07 to 0.14. So a row of weights along that mean acts as a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xarch_kd.taps.layout import layout_of

ROWS, TOKENS = 16, 128


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """Activation statistics of one block of a teacher.

    `constant` [hidden size]: constant · x is near 1 for every input x of the attention. The sizes are root mean squares
    over the hidden size, averaged over tokens, of the inputs and outputs of attention and MLP.
    """

    constant: Tensor
    mixer_input_size: float
    mixer_output_size: float
    mlp_input_size: float
    mlp_output_size: float


@torch.no_grad()
def activation_stats(teacher: PreTrainedModel, blocks: Sequence[int]) -> dict[int, ActivationStats]:
    """Return the statistics of these blocks on `ROWS` × `TOKENS` random tokens, always the same.

    Half of the rows gives the mean μ of the attention's input; the other half gives the factor a for which a μ·x is
    nearest to 1 in mean square, and the sizes.
    """
    if not blocks:
        return {}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, teacher.config.vocab_size, (ROWS, TOKENS), generator=generator).to(teacher.device)
    means: dict[int, Tensor] = {}
    stats: dict[int, ActivationStats] = {}
    with _watched(teacher, blocks) as seen:
        teacher.base_model(tokens[: ROWS // 2], use_cache=False)
        for index in blocks:
            means[index] = seen[index, "mixer"][0].mean(dim=(0, 1))
        teacher.base_model(tokens[ROWS // 2 :], use_cache=False)
        for index in blocks:
            (read, mixed), (mlp_read, mapped) = seen[index, "mixer"], seen[index, "mlp"]
            along = read @ means[index]
            stats[index] = ActivationStats(
                constant=means[index] * along.mean() / along.square().mean().clamp_min(1e-12),
                mixer_input_size=_size(read),
                mixer_output_size=_size(mixed),
                mlp_input_size=_size(mlp_read),
                mlp_output_size=_size(mapped),
            )
    return stats


def _size(values: Tensor) -> float:
    return max(float(values.square().mean(dim=-1).sqrt().mean()), 1e-6)


@contextmanager
def _watched(teacher: PreTrainedModel, blocks: Sequence[int]) -> Iterator[dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """Record inputs and outputs of attention and MLP of these blocks, in float32, of the latest forward pass."""
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def watch(index: int, name: str) -> Any:
        def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            read = named["hidden_states"] if "hidden_states" in named else given[0]
            seen[index, name] = (read.float(), (made[0] if isinstance(made, tuple) else made).float())

        return keep

    layout = layout_of(teacher)
    watched = {"mixer": layout.mixers, "mlp": layout.mlps or ()}
    handles = [
        modules[index].register_forward_hook(watch(index, name), with_kwargs=True)
        for index in blocks
        for name, modules in watched.items()
    ]
    training = teacher.training
    try:
        teacher.eval()
        yield seen
    finally:
        teacher.train(training)
        for handle in handles:
            handle.remove()
