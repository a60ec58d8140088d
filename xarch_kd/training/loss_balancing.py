"""Balanced weights (`weight: auto`) of a stage: the entries, the objective they are balanced against, their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.files import write_json
from xarch_kd.losses.balance import Balance
from xarch_kd.planning.plan import StagePlan

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
