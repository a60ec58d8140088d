"""Setup of a student for one stage: which stage of the plan, what trains, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.models.conversion.frozen_parameters import frozen_parameters
from xarch_kd.models.mamba_ssm.weights import own_names
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.training.low_rank import ADAPTER, own_name

# Tokens per chunk of Mamba-2's scan on a CPU. Pairs of tokens take time in proportion to it: with 256, the usual size
# for GPUs, the scan of rows of 256 tokens takes 2.5 times as long.
CPU_CHUNK: Final = 64


def freeze_others(student: PreTrainedModel, trainable: Iterable[str]) -> None:
    """Let the parameters `trainable` of a student train and freeze all others.

    Raises UsageError for a student that lacks one of them.
    """
    wanted = set(own_names(student, trainable))
    # A module with an adapter is wrapped.
    unknown = wanted - {own_name(name) for name, _ in student.named_parameters()}
    if unknown:
        raise UsageError(
            "the student is not the one that was planned: parameters to train are missing",
            asked=", ".join(sorted(unknown)[:3]),
            found=type(student).__name__,
        )
    # A student that was converted earlier and is trained further carries no plan that lists these.
    wanted -= set(frozen_parameters(student))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(own_name(name) in wanted or ADAPTER in name)


def stage_of(plan: Plan, stage: int | str) -> StagePlan:
    """Return the stage of a plan by index or name.

    Raises UsageError when there is none, and while the layers of the conversion are still to be chosen.
    """
    if plan.is_unselected:
        raise UsageError(
            "the layers of the conversion are not chosen yet: the plan has others in their place",
            asked="a conversion whose layers are chosen by measurement",
            fix="train the plan with xarch_kd.train, or write the list that `xarch-kd plan --calibrate` prints into it",
        )
    for candidate in plan.stages:
        if stage in (candidate.index, candidate.stage.name):
            return candidate
    names = ", ".join(f"{candidate.index} ({candidate.stage.name})" for candidate in plan.stages)
    raise UsageError("the plan has no such stage", asked=stage, allowed=names)


def set_checkpointing(student: PreTrainedModel, wanted: bool) -> None:
    """Turn non-reentrant gradient checkpointing on or off. Raises UsageError for a student without it."""
    # transformers renamed the pair of methods in its fifth major version; releases that we allow have one or the other.
    word = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if not hasattr(student, f"{word}_checkpointing_enable"):
        if wanted:
            raise UsageError(f"{type(student).__name__} has no gradient checkpointing", fix="set it to false")
        return
    if wanted:
        getattr(student, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(student, f"{word}_checkpointing_disable")()


@contextmanager
def cpu_chunks(module: nn.Module) -> Iterator[None]:
    """Let Mamba-2 mixers on a CPU scan in chunks of at most `CPU_CHUNK` tokens in the block.

    The size of the chunks changes the rounding of a mixer's output and nothing else.
    """
    sizes: list[tuple[Any, int]] = [
        (part, part.__dict__["chunk_size"])
        for part in module.modules()
        if isinstance(part.__dict__.get("chunk_size"), int)
        and isinstance(decay := getattr(part, "A_log", None), nn.Parameter)
        and decay.device.type == "cpu"
    ]
    for part, size in sizes:
        part.chunk_size = min(size, CPU_CHUNK)
    try:
        yield
    finally:
        for part, size in sizes:
            part.chunk_size = size


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode; each part of the module has its own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
