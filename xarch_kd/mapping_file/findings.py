"""What the resolution of a mapping file gathers, and what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from xarch_kd.errors import XarchError
from xarch_kd.mapping_file.marks import Problem
from xarch_kd.mapping_file.sides import Side


@dataclass
class Findings:
    """What is wrong and what is worth a notice, gathered over the whole file."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Note a problem that many pairs may share, once."""
        if problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Models:
    """Both models, the blocks of the student whose mixer was replaced, and what a calibration pass measured.

    `similarities` are [student layers, teacher layers] by `entry_key`; `frozen` are parameters of the student that no
    stage may train; `inherits` says that the student was made from the teacher, `fresh` that it knows nothing yet;
    `calibration` is the number of tokens of a calibration pass.
    """

    teacher: Side
    student: Side
    replaced: tuple[int, ...]
    similarities: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    inherits: bool = False
    fresh: bool = False
    calibration: int = 16_384


def told(error: XarchError) -> str:
    """Return an error on one line: what, found, allowed, fix."""
    details = (("found", error.found), ("allowed", error.allowed), ("fix", error.fix))
    return "; ".join([error.message.rstrip("."), *(f"{name}: {value}" for name, value in details if value is not None)])
