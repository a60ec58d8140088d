"""Source positions of a mapping file's values, and problems formatted as `file:line:column: place: what`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from xarch_kd.errors import MappingFileError

YamlPath = tuple[str | int, ...]

SHOWN_PROBLEMS = 50
SHOWN_COLUMNS = 100


@dataclass(frozen=True, order=True)
class Position:
    """Line and column of a character, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """Problem at `place`; `at` overrides the position, `on` selects the key or the value."""

    place: YamlPath
    message: str
    on: Literal["key", "value"] = "value"
    at: Position | None = None


@dataclass(frozen=True)
class SourceMap:
    """The positions of one file's keys and values, and the text of its scalars before they became numbers."""

    name: str
    lines: tuple[str, ...]
    keys: Mapping[YamlPath, Position] = field(default_factory=dict)
    values: Mapping[YamlPath, Position] = field(default_factory=dict)
    written: Mapping[YamlPath, str] = field(default_factory=dict)

    def position(self, place: YamlPath, on: Literal["key", "value"] = "value") -> Position:
        """Return where `place` is, or where its nearest written ancestor is (a default has no place of its own)."""
        first, second = (self.keys, self.values) if on == "key" else (self.values, self.keys)
        for length in range(len(place), -1, -1):
            ancestor = place[:length]
            found = first.get(ancestor) or second.get(ancestor)
            if found is not None:
                return found
        return Position(1, 1)

    def where(self, problem: Problem) -> Position:
        """Return the position that `problem` points at."""
        return problem.at or self.position(problem.place, problem.on)

    def render(self, problem: Problem) -> str:
        """Return the problem as `file:line:column: place: message`, then the line itself and a caret under it."""
        position = self.where(problem)
        head = f"{self.name}:{position.line}:{position.column}: {_prefix(problem)}{problem.message}"
        if not 1 <= position.line <= len(self.lines) or not self.lines[position.line - 1].strip():
            return head
        shown, column = _window(self.lines[position.line - 1], position.column)
        margin = f"{position.line:>5} | "
        return f"{head}\n{margin}{shown}\n{' ' * (len(margin) - 2)}| {' ' * (column - 1)}^"


def yaml_path_text(place: YamlPath) -> str:
    """Return a place as it is spoken of: `stages[0].align[1].tap`."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + shortened(step)
    return text


def shortened(text: str, limit: int = 60) -> str:
    """Return `text` on one line of at most `limit` characters."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= limit else line[: limit - 1] + "…"


def mapping_error(problems: Iterable[Problem], source_map: SourceMap | None) -> MappingFileError:
    """Return one error with all problems in the order of the file; without positions only their places."""
    if source_map is None:
        name, rendered = "mapping", [f"mapping: {_prefix(problem)}{problem.message}" for problem in problems]
    else:
        name = source_map.name
        rendered = [source_map.render(problem) for problem in sorted(problems, key=source_map.where)]
    texts = list(dict.fromkeys(rendered))
    if len(texts) > SHOWN_PROBLEMS:
        texts[SHOWN_PROBLEMS:] = [f"{name}: and {len(texts) - SHOWN_PROBLEMS} more problems"]
    return MappingFileError(texts)


def _prefix(problem: Problem) -> str:
    return f"{yaml_path_text(problem.place)}: " if problem.place else ""


def _window(line: str, column: int) -> tuple[str, int]:
    """Return the part of a line to show around `column`, and the column inside that part."""
    line = line.replace("\t", " ")
    start = max(0, column - 1 - SHOWN_COLUMNS * 3 // 4) if len(line) > SHOWN_COLUMNS else 0
    return line[start : start + SHOWN_COLUMNS].rstrip(), column - start
