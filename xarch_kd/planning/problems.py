"""Problems and warnings collected while a mapping file is resolved."""

from __future__ import annotations

from dataclasses import dataclass, field

from xarch_kd.errors import XarchError
from xarch_kd.mapping_file.source_map import Problem


@dataclass
class Diagnostics:
    """Errors and warnings, collected over the whole file."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Add a problem that many pairs may share, once."""
        if problem not in self.problems:
            self.problems.append(problem)


def one_line(error: XarchError) -> str:
    """Return an error on one line: what, found, allowed, fix."""
    details = (("found", error.found), ("allowed", error.allowed), ("fix", error.fix))
    return "; ".join([error.message.rstrip("."), *(f"{name}: {value}" for name, value in details if value is not None)])
