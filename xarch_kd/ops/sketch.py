"""`mixing_distance` estimated by random signs: E |(P - M) z|² of a row is |P - M|² for independent signs z.

Each probe is one column through both mixers' own `apply`, so time and memory grow as those do. The estimate of each row
and its gradient have no bias; the spread over probes gives the standard error of the total (Hutchinson 1990).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.ops.mixing_inputs import MixingDistanceInputs
from xarch_kd.ops.panels import leaves, mixed_target
from xarch_kd.ops.row_distances import FORMULAS, EntryFormula, LogarithmFormula
from xarch_kd.ops.streaming.autograd import Gradients, attach_gradients, recompute, stored, wanted

LEAST_PROBES: Final = 2


def unsupported_reason(formula: EntryFormula | LogarithmFormula) -> str | None:
    """Return why a sketch cannot give this distance, or None when it can."""
    if isinstance(formula, EntryFormula) and formula.is_sum_of_squares:
        return None
    squares = [row.name for row in FORMULAS.values() if isinstance(row, EntryFormula) and row.is_sum_of_squares]
    return (
        f"random probes estimate sums of squares without bias, and {formula.name} is none "
        f"({' and '.join(squares)} {'is' if len(squares) == 1 else 'are'})"
    )


def draw_signs(inputs: MixingDistanceInputs, probes: int, seed: int | torch.Generator | None) -> Tensor:
    """Return random signs [batch, time, probes] as int8; the same seed gives the same signs on every device.

    Raises UsageError for fewer than 2 probes, which have no spread.
    """
    if probes < LEAST_PROBES:
        raise UsageError("A standard error needs a spread.", asked=f"probes={probes}", allowed=f">= {LEAST_PROBES}")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    shape = (inputs.student.batch, inputs.student.time, probes)
    device = "cpu" if generator is None else generator.device
    bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=device)
    return bits.mul_(2).sub_(1).to(inputs.student.device)


def estimate(
    inputs: MixingDistanceInputs, signs: Tensor, weights: Tensor, reduction: str, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Return the estimated total and its standard error, from signs [batch, time, probes].

    `weights` [batch, time, 1] multiply each row in the total; `chunk_size` probes are applied at a time.
    """
    names, factors = zip(*inputs.student.factors.items(), strict=True)
    needs = frozenset(name for name, need in zip(names, wanted(*factors), strict=True) if need)
    now = needs if reduction != "none" else frozenset[str]()
    samples, found = _forward_backward(inputs, signs, weights, now, chunk_size, reduction)
    total = samples.mean
    standard_error = samples.standard_error()

    def gradients(parts: dict[str, Tensor]) -> Gradients:
        return [stored(parts.get(name), factor) for name, factor in zip(names, factors, strict=True)]

    if needs and reduction != "none":
        total = attach_gradients(total, factors, gradients(found))
    elif needs:
        total = recompute(
            total,
            factors,
            lambda up: gradients(_forward_backward(inputs, signs, up * weights, needs, chunk_size, reduction)[1]),
        )
    return total, standard_error


class _Samples:
    """Mean and spread of one number, or one per row, over probes."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        """Take in samples [..., probes] (Chan's update of mean and sum of squared deviations)."""
        count, mean = samples.shape[-1], samples.mean(-1)
        squares = (samples - mean[..., None]).square().sum(-1)
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, apart = self.count + count, mean - self.mean
        self.squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def standard_error(self) -> Tensor:
        """Return the standard error of the mean."""
        return (self.squares / ((self.count - 1) * self.count)).sqrt()


@torch.no_grad()
def _forward_backward(
    inputs: MixingDistanceInputs,
    signs: Tensor,
    weights: Tensor,
    needs: frozenset[str],
    chunk_size: int | None,
    reduction: str,
) -> tuple[_Samples, dict[str, Tensor]]:
    probes = signs.shape[-1]
    chunk = chunk_size or probes
    student, factors = leaves(inputs.student, needs)
    gradients = {name: torch.zeros_like(leaf, dtype=inputs.dtype) for name, leaf in factors.items()}
    samples = _Samples()
    with torch.autocast(signs.device.type, enabled=False):
        for start in range(0, probes, chunk):
            values = signs[:, :, None, start : start + chunk].to(inputs.dtype)
            with torch.set_grad_enabled(bool(factors)):
                mixed = student.apply(values.expand(-1, -1, student.heads, -1))
            difference = mixed.detach().to(inputs.dtype) - mixed_target(inputs, values)
            if factors:
                slope = (difference * (weights * (2 / probes))[..., None]).to(mixed.dtype)
                parts = torch.autograd.grad(mixed, list(factors.values()), slope, allow_unused=True)
                for name, part in zip(factors, parts, strict=True):
                    if part is not None:
                        gradients[name] += part
            rows = difference.square_().masked_fill_(~inputs.valid_mask[:, :, None, None], 0)
            samples.add(rows if reduction == "none" else rows.mul_(weights[..., None]).sum((0, 1, 2)))
    return samples, gradients
