"""Balanced weights (`weight: auto`) of a stage: the entries, the objective they are balanced against, their file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.files import write_json
from xarch_kd.losses.balance import Balance
from xarch_kd.planning.plan import StagePlan

if TYPE_CHECKING:
    from xarch_kd.training.aligner import Aligner

TOKENS: Final = "tokens"
# Beside a file of trained tensors.
BALANCE_FILE: Final = "balance.json"


def balance_of(stage: StagePlan) -> Balance | None:
    """Return the balance of a stage with an entry of `weight: auto`, against its tokens or its first other entry.

    Raises UsageError when there is nothing to balance against.
    """
    present = {pair.align for pair in stage.pairs}
    entries = [entry for entry in stage.stage.align if entry.name in present]
    balanced = tuple(entry.name for entry in entries if entry.loss.weight == "auto")
    if not balanced:
        return None
    fixed = [entry.name for entry in entries if entry.name not in balanced]
    anchor = TOKENS if stage.stage.tokens is not None else next(iter(fixed), None)
    if anchor is None:
        raise UsageError(
            "every objective that is left in the stage has weight: auto, so there is nothing to balance against",
            asked=", ".join(balanced),
            fix="give one of them a number",
        )
    return Balance(anchor=anchor, parts=balanced)


def observe_gradients(aligner: Aligner, backward: Callable[[str], None], *, step: int) -> None:
    """Measure the gradient of each balanced objective on the student at one step, and update the aligner's balance.

    `backward(name)` runs forward and backward of the whole step for one objective, through the module that is trained
    (the wrapped one where it is replicated over processes, so that every rank measures the same gradients):

        observe_gradients(aligner, lambda name: aligner(ids, step=step, objective=name).loss.backward(), step=step)

    It does nothing once the balance is done, or in a stage without `weight: auto`. Gradients that were accumulated
    before are kept. An objective that is not active at the step, or has no gradient on the student, is not counted.

    Raises NonFiniteLoss for a gradient that is NaN or infinite.
    """
    balance = aligner.balance
    if balance is None or balance.done:
        return
    trained = [parameter for parameter in aligner.parameters() if parameter.requires_grad]
    student = [parameter for parameter in aligner.student.parameters() if parameter.requires_grad]
    accumulated = [parameter.grad for parameter in trained]
    norms: dict[str, float] = {}
    try:
        for name in (balance.anchor, *balance.parts):
            for parameter in trained:
                parameter.grad = None
            backward(name)
            gradients = [parameter.grad.float() for parameter in student if parameter.grad is not None]
            norms[name] = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    finally:
        for parameter, gradient in zip(trained, accumulated, strict=True):
            parameter.grad = gradient
    aligner.balance = balance.observe(norms)
    aligner.balanced_step = step


def require_balanced(balance: Balance | None, balanced_step: int | None, step: int) -> None:
    """Raise UsageError where gradients are taken before the weights of the step were balanced."""
    if balance is None or balance.done or balanced_step == step or not torch.is_grad_enabled():
        return
    raise UsageError(
        "the weights of objectives with weight: auto were not balanced at this step",
        asked=f"step {step}",
        found="never balanced" if balanced_step is None else f"balanced at step {balanced_step}",
        fix="call xarch_kd.training.loss_balancing.observe_gradients(aligner, backward, step=step) first",
    )


def write_balance(balance: Balance, beside: Path) -> None:
    """Write a balance beside a file of trained tensors. Raises CheckpointError if it can't."""
    write_json(beside.with_name(BALANCE_FILE), balance.state())


def read_balance(balance: Balance, beside: Path) -> Balance:
    """Return the balance that was written beside a file, or `balance` where there is none.

    Raises CheckpointError for a file that cannot be read or is another stage's.
    """
    path = beside.with_name(BALANCE_FILE)
    if not path.exists():
        return balance
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}", found=str(error), fix="delete it and run again with --resume"
        ) from error
    return balance.load(state)
