"""Loader of mapping files: size bounds, YAML subset, schema; all problems are reported at once with line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xarch_kd.mapping_file.read import read_mapping_text
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.mapping_file.source_map import Position, Problem, SourceMap, YamlPath, mapping_error
from xarch_kd.mapping_file.validation_messages import problems_of
from xarch_kd.mapping_file.yaml_core import read_yaml

_NEEDS = "It needs the keys version, teacher, student, data and stages; `xarch-kd init TEACHER` writes a whole file."


def load_mapping(path: str | Path) -> tuple[MappingFile, str, SourceMap]:
    """Return the mapping file at `path`, its text, and the positions of its values.

    Raises `MappingFileError` with every problem as `file:line:column: place: what`, the line and a caret.

    >>> import xarch_kd as xkd
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> mapping, text, _ = xkd.load_mapping("mapping.yaml")
    >>> mapping.student.convert.mixer
    'mamba2'
    """
    path = Path(path)
    text = read_mapping_text(path)
    mapping, source_map = parse_mapping(text, str(path))
    return mapping, text, source_map


def parse_mapping(text: str, name: str = "mapping.yaml") -> tuple[MappingFile, SourceMap]:
    """Return the mapping file in `text` and the positions of its values; `name` is the file's name in messages."""
    value, source_map, problems = read_yaml(text, name)
    if value is None and not problems:
        raise mapping_error([Problem((), f"the file is empty. {_NEEDS}", at=Position(1, 1))], source_map)
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, tuple) else "a single value"
        raise mapping_error(
            [*problems, Problem((), f"the top level must be a mapping, found {found}. {_NEEDS}")], source_map
        )
    return validate_mapping(value, problems, source_map), source_map


def validate_mapping(value: dict[str, Any], problems: list[Problem], source_map: SourceMap | None) -> MappingFile:
    """Return the mapping file of plain values (lists as tuples), in which `problems` were found before.

    `source_map` is None for values that were not read from a file. Raises `MappingFileError` with every problem.
    """
    try:
        mapping = MappingFile.model_validate(value)
    except ValidationError as error:
        spoilt = [problem.place or _place_at(source_map, problem) for problem in problems]
        found_here = (problem for problem in problems_of(error, value, source_map) if not _follows(problem, spoilt))
        raise mapping_error([*problems, *found_here], source_map) from None
    if problems:
        raise mapping_error(problems, source_map)
    return mapping


def _place_at(source_map: SourceMap | None, problem: Problem) -> YamlPath:
    """Return the place of the value that starts where `problem` is, or the root."""
    if source_map is None:
        return ()
    return next((place for place, position in source_map.values.items() if position == problem.at), ())


def _follows(problem: Problem, spoilt: list[YamlPath]) -> bool:
    """Return true if `problem` only follows from a value that YAML itself refused, inside it or around it."""
    inside = any(outer and problem.place[: len(outer)] == outer for outer in spoilt)
    return inside or (problem.on == "key" and any(inner[: len(problem.place)] == problem.place for inner in spoilt))
