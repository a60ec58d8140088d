"""Problems and warnings collected while a mapping file is resolved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from xarch_kd.errors import ModelError, XarchError
from xarch_kd.mapping_file.source_map import Problem, SourceMap, YamlPath, yaml_path_text


@dataclass
class Diagnostics:
    """Errors and warnings, collected over the whole file.

    `for_training` is false where a finished run is measured, which needs no optimizer and no writer.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    for_training: bool = True

    def add(self, problem: Problem) -> None:
        """Add a problem that many pairs may share, once."""
        if problem not in self.problems:
            self.problems.append(problem)


def one_line(error: XarchError) -> str:
    """Return an error on one line: what, found, allowed, fix."""
    details = (("found", error.found), ("allowed", error.allowed), ("fix", error.fix))
    return "; ".join([error.message.rstrip("."), *(f"{name}: {value}" for name, value in details if value is not None)])


@contextmanager
def located(yaml_path: YamlPath, source_map: SourceMap | None) -> Iterator[None]:
    """Put the place in the mapping in front of the message of a `ModelError`."""
    try:
        yield
    except ModelError as error:
        location = yaml_path_text(yaml_path)
        if source_map is not None:
            position = source_map.position(yaml_path)
            location = f"{source_map.name}:{position.line}:{position.column}: {location}"
        raise type(error)(
            f"{location}: {error.message}", asked=error.asked, found=error.found, allowed=error.allowed, fix=error.fix
        ) from error
