"""New mixers of all blocks, each trained alone to give what the teacher's attention gives on the same input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor, nn

from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, NonFiniteLoss
from xarch_kd.models.conversion.frozen_parameters import frozen_parameters
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.replay import block_calls, run_mixer
from xarch_kd.taps.trace import trace

RATE: Final = 1e-2


def align_mixers(
    teacher: Layout, pool: Mapping[int, Layout], batches: Sequence[Batch], *, steps: int, reporter: Reporter
) -> None:
    """Train the mixer of each block of `pool` on Σ|y - t|² / Σ|t|², t the teacher's mixer output on the same input.

    `pool` has, for each block, the layout of a student with a new mixer there. Mixers don't read each other, so any
    subset of them is trained as if it alone had been. AdamW on all of a mixer's weights, its rate falling linearly
    from `RATE`, gradients of each mixer clipped to norm 1; `batches` are used in turn. Raises NonFiniteLoss.
    """
    layers = sorted(pool)
    owners = {layer: _trained(pool[layer], layer) for layer in layers}
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in owners.values()], lr=RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    models = {id(layout): layout for layout in pool.values()}
    with _training(owners.values()), reporter.work("choosing layers: aligning mixers", steps, "steps") as work:
        for step in range(steps):
            batch = batches[step % len(batches)].to(next(teacher.model.parameters()).device)
            with torch.no_grad():
                taps = {"mixer_input": layers, "mixer_output": layers}
                theirs = trace(teacher, batch.input_ids, batch.model_mask, taps=taps, position_ids=batch.position_ids)
                calls = {
                    key: block_calls(layout, batch.input_ids, batch.model_mask, position_ids=batch.position_ids)
                    for key, layout in models.items()
                }
            counted = batch.valid
            for layer in layers:
                own = run_mixer(pool[layer], layer, theirs["mixer_input"][layer], calls[id(pool[layer])])
                wanted = theirs["mixer_output"][layer]
                if counted is not None:
                    own, wanted = own.flatten(0, 1)[counted], wanted.flatten(0, 1)[counted]
                loss = (own - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
                if not bool(loss.detach().isfinite()):
                    raise NonFiniteLoss(
                        f"The loss of the new mixer of block {layer} is not finite at step {step} of aligning it.",
                        fix="leave aligned out, or start the mixers differently (init: random)",
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(owners[layer], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            work.advance()


def mixer_weights(layouts: Mapping[int, Layout], layers: Collection[int]) -> dict[str, Tensor]:
    """Return the weights of the mixers of `layers`, by block and name."""
    return {
        f"{layer}.{name}": tensor
        for layer in layers
        for name, tensor in layouts[layer].mixers[layer].state_dict().items()
    }


def set_mixer_weights(student: Layout, weights: Mapping[str, Tensor]) -> None:
    """Give a student's mixers the weights that `mixer_weights` returned. Raises CheckpointError if they do not fit."""
    by_layer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        layer, _, name = key.partition(".")
        by_layer.setdefault(int(layer), {})[name] = tensor
    for layer, state in by_layer.items():
        try:
            student.mixers[layer].load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"The aligned mixer of block {layer} is not one of this student.", found=error
            ) from None


def _trained(layout: Layout, layer: int) -> list[nn.Parameter]:
    frozen = {name for name in frozen_parameters(layout.model)}
    named = dict(layout.model.named_parameters())
    return [named[name] for name in layout.mixer_parameter_names(layer) if name not in frozen]


def _training(groups: Iterable[Sequence[nn.Parameter]]) -> ExitStack:
    """Let the parameters get gradients in the block."""
    stack = ExitStack()
    for parameter in (parameter for group in groups for parameter in group):
        stack.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(True)
    return stack
