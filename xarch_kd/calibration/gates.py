"""Choice of a conversion's layers by gates between each block and its new one, all trained together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from xarch_kd.calibration.substitution import SubstitutedTeacher
from xarch_kd.mapping_file.layer_choice import Metric
from xarch_kd.run.report import Reporter

RATE: Final = 0.05
# The weight of the gates' mean at the start, and the steps after which it doubles while they are above the budget.
FIRST_WEIGHT: Final = 0.05
DOUBLED_AFTER: Final = 10


def trained_gates(
    substituted: SubstitutedTeacher, kept: int, metric: Metric, *, steps: int, reporter: Reporter
) -> list[float]:
    """Return the share of each block's own output in a model whose blocks give α·own + (1 − α)·new, after training.

    All weights are frozen. The shares α = σ(a), from 0.5, are trained with Adam on KL(teacher ‖ gated) by `metric`, in
    nats per token, plus λ·mean α; λ doubles every few steps in which Σα exceeds `kept`, the blocks that may keep their
    attention (FlashMorph's gates, at the output of blocks in place of that of mixers).
    """
    count = len(substituted.teacher.blocks)
    gates = torch.zeros(count, device=next(substituted.teacher.model.parameters()).device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=RATE)
    weight = FIRST_WEIGHT
    models = {id(layout): layout.model for layout in (substituted.teacher, *substituted.pool.values())}
    with _frozen(models.values()), reporter.work("choosing layers: training gates", steps, "steps") as work:
        for step in range(steps):
            shares = gates.sigmoid()
            loss = substituted.gated_divergence(shares, metric) + weight * shares.mean()
            (gates.grad,) = torch.autograd.grad(loss, [gates])
            optimizer.step()
            if step % DOUBLED_AFTER == DOUBLED_AFTER - 1 and float(shares.detach().sum()) > kept:
                weight *= 2
            work.advance()
    return gates.detach().sigmoid().tolist()


@contextmanager
def _frozen(models: Iterable[nn.Module]) -> Iterator[None]:
    flags: list[tuple[Tensor, bool]] = [
        (parameter, parameter.requires_grad) for model in models for parameter in model.parameters()
    ]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
