"""Plain YAML with the scalars of YAML 1.2's core schema: no anchors, aliases, tags or merge keys, bounded in depth.

PyYAML speaks YAML 1.1, where `1e-4` is text, `no` is false and `22:30` is the number 1350.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from xarch_kd.mapping_file.source_map import Position, Problem, SourceMap, YamlPath, mapping_error, shortened

MAXIMUM_DEPTH = 20
LARGEST_INTEGER = 2**63 - 1

_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ("~", "n", "N", "")),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), tuple("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), tuple("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        tuple("-+0123456789."),
    ),
)


def _core_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first_characters in _SCALARS:
        for character in first_characters:
            resolvers.setdefault(character, []).append((_TAG + name, pattern))
    return resolvers


class CoreLoader(yaml.SafeLoader):
    """Composes nodes with core-schema scalars. What is refused is collected in `problems`, each with its position."""

    yaml_implicit_resolvers = _core_resolvers()

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[Problem] = []
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node; an alias becomes an empty scalar, so that the rest of the file is still checked."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            self._refuse(event, f"the alias *{shortened(event.anchor)} is not allowed. Write the value out again.")
            return yaml.ScalarNode(_TAG + "null", "", event.start_mark, event.end_mark)
        if event.anchor is not None:
            self._refuse(
                event, f"the anchor &{shortened(event.anchor)} is not allowed. Write the value out where it is used."
            )
        if event.tag is not None:
            self._refuse(
                event, f"the tag {shortened(event.tag)} is not allowed: a mapping file holds plain values only."
            )
        event.anchor = event.tag = None
        if isinstance(event, yaml.ScalarEvent):
            event.implicit = (event.style is None, True)
        self.depth += 1
        if self.depth > MAXIMUM_DEPTH:
            raise ComposerError(None, None, f"nested deeper than {MAXIMUM_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, event: yaml.Event, message: str) -> None:
        self.problems.append(Problem((), message, at=_position(event.start_mark)))


def read_yaml(text: str, name: str) -> tuple[Any, SourceMap, list[Problem]]:
    """Return the value of a YAML text (lists as tuples), its marks, and what is refused in it.

    Raises `MappingFileError` where the text is not YAML at all or is nested too deeply.
    """
    source_map = SourceMap(name, tuple(_LINE_BREAK.split(text)), {}, {}, {})
    problems: list[Problem] = []
    try:
        loader = CoreLoader(text)
        problems = loader.problems
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise mapping_error([*problems, _syntax_problem(error)], source_map) from None
    except ReaderError as error:
        before = _LINE_BREAK.split(text[: error.position])
        at = Position(len(before), len(before[-1]) + 1)
        message = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise mapping_error([*problems, Problem((), message, at=at)], source_map) from None
    except (ValueError, OverflowError) as error:
        # PyYAML lets these through for "\UFFFFFFFF" and for endless digits in a %YAML line.
        raise mapping_error([*problems, Problem((), f"not valid YAML: {error}")], source_map) from None
    if node is None:
        return None, source_map, problems
    reading = _Reading(source_map, problems)
    return reading.value(node, ()), source_map, problems


class _Reading:
    """Turns nodes into values and notes where each was written."""

    def __init__(self, source_map: SourceMap, problems: list[Problem]) -> None:
        self.keys: dict[YamlPath, Position] = source_map.keys  # type: ignore[assignment]
        self.values: dict[YamlPath, Position] = source_map.values  # type: ignore[assignment]
        self.written: dict[YamlPath, str] = source_map.written  # type: ignore[assignment]
        self.problems = problems

    def value(self, node: yaml.Node, place: YamlPath) -> Any:
        self.values[place] = _position(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, (*place, index)) for index, item in enumerate(node.value))
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, place: YamlPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = _position(key_node.start_mark)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str" or not is_encodable(key):
                written = f" {shortened(key)}" if isinstance(key, str) and key and is_encodable(key) else ""
                self.problems.append(Problem(place, f"a key must be text; put{written or ' it'} in quotes", at=at))
            elif key == "<<":
                self.problems.append(Problem(place, "merge keys (<<) are not allowed. Write the keys out.", at=at))
            elif key in result:
                first = self.keys[(*place, key)].line
                self.problems.append(Problem((*place, key), f"given twice, first on line {first}", at=at))
            else:
                self.keys[(*place, key)] = at
                result[key] = self.value(value_node, (*place, key))
        return result

    def _scalar(self, node: yaml.Node, place: YamlPath) -> Any:
        text: str = node.value
        self.written[place] = text
        if not is_encodable(text):
            self.problems.append(Problem(place, "holds half of a surrogate pair, which is no character"))
            return ""
        kind = node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return self._integer(text, place)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def _integer(self, text: str, place: YamlPath) -> int:
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        # 64 characters hold every allowed number; int() itself refuses thousands of digits.
        number = int(text, base) if len(text) <= 64 else LARGEST_INTEGER + 1
        if abs(number) > LARGEST_INTEGER:
            self.problems.append(Problem(place, f"the number is too large: at most {LARGEST_INTEGER}"))
            return 0
        return number


def _position(mark: yaml.Mark) -> Position:
    return Position(mark.line + 1, mark.column + 1)


def is_encodable(text: str) -> bool:
    """Return whether `text` holds no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _syntax_problem(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    said = ", ".join(part for part in (error.context, error.problem) if part)
    if "nested deeper" not in said:
        said = f"not valid YAML: {said}"
    if "'\\t'" in said:
        said += ". Indent with spaces, not with tabs."
    elif error.problem == "mapping values are not allowed here":
        said += ". A value with ': ' in it must be in quotes; keys of one block must start in the same column."
    return Problem((), said, at=_position(mark) if mark else None)
