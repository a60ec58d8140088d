"""Validation errors of the schema, in terms of the mapping file."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from xarch_kd.errors import renamed, suggest
from xarch_kd.mapping_file.answers import answer
from xarch_kd.mapping_file.scalars import ConfigModel
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.mapping_file.source_map import Problem, SourceMap, YamlPath, shortened

_MISSING = object()
_MISSING_KEY = "required key is missing."
_WRONG_KIND = {
    "string_type",
    "int_type",
    "float_type",
    "bool_type",
    "tuple_type",
    "dict_type",
    "model_type",
    "model_attributes_type",
    "none_required",
}
# Old spelling of a key -> the spelling since.
RENAMED: Final = {
    "implementation": "impl",
    "initialise": "init",
    "initialisation": "init",
    "standardise": "standardize",
    "width": "hidden",
}
# Keys that discriminate between the parts of a union.
TAGS = ("kind", "strategy")
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(error: ValidationError, data: Any, source_map: SourceMap | None) -> list[Problem]:
    """Return the problems behind a validation error of `MappingFile.model_validate(data)`, without duplicates."""
    problems: dict[Problem, None] = {}
    for details in error.errors(include_url=False):
        place, branches = _follow(details["loc"], data)
        misfit = next((step for step, label in branches if not _branch_fits(label, _value_at(step, data))), None)
        if misfit is None:
            problem = _problem(details, place, data, source_map)
            if problem is not None:
                problems[problem] = None
        elif not _some_branch_fits(_annotation_at(misfit, data), _value_at(misfit, data)):
            problems[_wrong_kind(misfit, data, source_map)] = None
    return [problem for problem in problems if not _is_misspelt(problem, problems)]


def _is_misspelt(problem: Problem, problems: Iterable[Problem]) -> bool:
    """Say whether a missing key is there under a wrong name, which is a problem of its own."""
    if not problem.message.startswith(_MISSING_KEY):
        return False
    mended = f"unknown key.{suggest(str(problem.place[-1]), [str(problem.place[-1])])}"
    return any(other.message == mended and other.place[:-1] == problem.place[:-1] for other in problems)


def _problem(details: ErrorDetails, place: YamlPath, data: Any, source_map: SourceMap | None) -> Problem | None:
    kind = details["type"]
    context = details.get("ctx", {})
    value = _value_at(place, data)
    if kind == "default_factory_not_called":
        # The default depends on other entries, whose own problem is reported.
        return None
    if kind == "extra_forbidden":
        return Problem(place, _unknown_key(place, data), on="key")
    if kind == "missing":
        return Problem(place, _missing_key(place, data), on="key" if isinstance(place[-2:-1] or 0, str) else "value")
    if kind in _WRONG_KIND:
        return _wrong_kind(place, data, source_map)
    if kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
        return _not_one_of(kind, place, data, source_map)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return Problem(place, f"must be {words} {context[name]}, found {_found(value)}")
    if kind == "finite_number":
        return Problem(place, "must be a finite number")
    if kind == "string_pattern_mismatch":
        return Problem(
            place, f"may hold letters, digits, - and _ and must start with a letter or digit, found {_found(value)}"
        )
    if kind == "string_too_long":
        return Problem(place, f"must have at most {context['max_length']} characters, found {len(str(value))}")
    if kind == "too_short":
        # Pydantic also reports this for a list in which every entry failed for its own reason.
        long_enough = isinstance(value, tuple) and len(value) >= context["min_length"]
        return None if long_enough else Problem(place, f"must have at least {context['min_length']} entry")
    if kind == "too_long":
        return Problem(place, f"must have at most {context['max_length']} entries, found {context['actual_length']}")
    message = details["msg"].removeprefix("Value error, ")
    return Problem(place, message, on="key")


def _unknown_key(place: YamlPath, data: Any) -> str:
    key = str(place[-1])
    part = _part(_annotation_at(place[:-1], data), _value_at(place[:-1], data))
    # The discriminator comes first, even if the parent's keys precede it.
    allowed = sorted(part.model_fields, key=lambda name: name not in TAGS) if part is not None else []
    if RENAMED.get(key) in allowed:
        return renamed(key, RENAMED[key], kind="key")
    suggestion = suggest(key, allowed)
    if suggestion:
        return f"unknown key.{suggestion}"
    if instead := answer(key):
        return instead
    siblings = _value_at(place[:-1], data)
    fields = part.model_fields if part is not None else {}
    for sibling, value in siblings.items() if isinstance(siblings, dict) else ():
        if value is None and sibling in fields:
            inner = _parts(fields[sibling].annotation)
            if any(key in option.model_fields for option in inner):
                return (
                    f"unknown key here. It is a key of '{sibling}', which is empty: indent it further than '{sibling}'."
                )
    here = {step for step in place[-3:-1] if isinstance(step, str)}
    elsewhere = sorted(_owners(key, MappingFile, "") - here)
    owners = f" here, a key of {' and of '.join(elsewhere)}" if elsewhere else ""
    return f"unknown key{owners}. Allowed here: {', '.join(allowed)}"


def own_keys() -> frozenset[str]:
    """Return all keys of the format, wherever they stand."""
    return _keys(MappingFile)


@functools.cache
def _keys(part: type[ConfigModel]) -> frozenset[str]:
    children = {child for field in part.model_fields.values() for child in _children(field.annotation)}
    return frozenset(part.model_fields).union(*(_keys(child) for child in children))


def _children(annotation: Any) -> Iterator[type[ConfigModel]]:
    for option in _options(annotation):
        yield from {"mapping": [option], "list": _item_parts(option)}.get(_kind(option), [])


@functools.cache
def _owners(key: str, part: type[ConfigModel], name: str) -> frozenset[str]:
    """Return the keys whose mappings have `key`, below a part of that name."""
    found = {name or "the file itself"} if key in part.model_fields else set()
    for inner, field in part.model_fields.items():
        for child in _children(field.annotation):
            found |= _owners(key, child, inner)
    return frozenset(found)


def _missing_key(place: YamlPath, data: Any) -> str:
    annotation = _annotation_at(place, data)
    if isinstance(place[-1], int):
        return f"an entry is missing: {expected(annotation)}"
    return f"{_MISSING_KEY} It must be {expected(annotation)}."


def _wrong_kind(place: YamlPath, data: Any, source_map: SourceMap | None) -> Problem:
    value = _value_at(place, data)
    annotation = _annotation_at(place, data)
    message = f"must be {expected(annotation)}, found {_found(value)}."
    wanted = {"parts" if _item_parts(option) else _kind(option) for option in _options(annotation)}
    written = shortened(str(value) if source_map is None else source_map.written.get(place, str(value)))
    if value is None:
        if source_map is not None:
            message += " If its entries follow, indent them further than this line; if it is not wanted,"
        else:
            message += " If it is not wanted,"
        message += " leave the key out."
        return Problem(place, message, on="key")
    if "list" in wanted and not isinstance(value, dict | tuple):
        message += f" Write a list: [{written}]."
    elif "text" in wanted and isinstance(value, bool | int | float):
        message += f" Put it in quotes: '{written}'."
    return Problem(place, message)


def _not_one_of(kind: str, place: YamlPath, data: Any, source_map: SourceMap | None) -> Problem:
    value = _value_at(place, data)
    annotation = _annotation_at(place, data)
    if kind == "literal_error":
        choices = _choices(annotation)
        if type(value) not in {type(choice) for choice in choices}:
            return _wrong_kind(place, data, source_map)
        return Problem(place, f"{_found(value)} is not {expected(annotation)}.{suggest(str(value), map(str, choices))}")
    key = _discriminator(_parts(annotation)[0])
    kinds = [choice for option in _parts(annotation) for choice in _choices(option.model_fields[key].annotation)]
    names = " | ".join(kinds)
    if kind == "union_tag_not_found":
        return Problem((*place, key), f"{_MISSING_KEY} It must be {names}.")
    given = value[key]
    problem = f"{_found(given)} is not {names}.{suggest(str(given), kinds)}"
    return Problem((*place, key), problem)


def _discriminator(part: type[ConfigModel]) -> str:
    """Return the discriminator of a union."""
    return "kind" if "kind" in part.model_fields else "strategy"


def expected(annotation: Any) -> str:
    """Return the values that `annotation` allows, in words, e.g. `a whole number`."""
    words = []
    options = list(_options(annotation))
    told_apart = sum(_kind(option) == "mapping" for option in options) > 1
    for option in options:
        kind = _kind(option)
        if kind == "choice":
            words.append(" | ".join(map(str, get_args(option))))
        elif kind == "list":
            parts = _item_parts(option)
            words.append(f"a list of {{{', '.join(parts[0].model_fields)}}} entries" if parts else "a list")
        elif kind == "values":
            is_config = get_args(option)[1] is Any
            words.append("a mapping with a model_type and its sizes" if is_config else "a mapping of names to values")
        elif kind == "mapping":
            keys = f"keys among {', '.join(option.model_fields)}"
            words.append(f"a mapping with a '{_discriminator(option)}'" if told_apart else f"a mapping with {keys}")
        else:
            words.append({"text": "text", "whole": "a whole number", "number": "a number"}.get(kind, "true or false"))
    return ", or ".join(dict.fromkeys(words))


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    return "a list" if isinstance(value, tuple) else "a mapping"


def _kind(option: Any) -> str:
    if get_origin(option) is Literal:
        return "choice"
    if get_origin(option) is tuple:
        return "list"
    if get_origin(option) is dict:
        return "values"
    if isinstance(option, type) and issubclass(option, ConfigModel):
        return "mapping"
    return {str: "text", int: "whole", float: "number", bool: "truth"}[option]


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the branches of an annotation, `None` left out and `Annotated` taken off."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    elif annotation is not type(None):
        yield annotation


def _parts(annotation: Any) -> list[type[ConfigModel]]:
    return [option for option in _options(annotation) if _kind(option) == "mapping"]


def _item_parts(option: Any) -> list[type[ConfigModel]]:
    """Return the parts that a list's entries are, none for other annotations and where entries may be plain values."""
    if _kind(option) != "list":
        return []
    parts = _parts(get_args(option)[0])
    return parts if len(parts) == len(list(_options(get_args(option)[0]))) else []


def _choices(annotation: Any) -> list[Any]:
    return [choice for option in _options(annotation) if _kind(option) == "choice" for choice in get_args(option)]


def _part(annotation: Any, value: Any) -> type[ConfigModel] | None:
    """Return the part that a mapping `value` is meant to be: the only one there is, or the one of its `kind`.

    Layer strategies have `strategy` in its place.
    """
    parts = _parts(annotation)
    if len(parts) == 1:
        return parts[0]
    given = value if isinstance(value, dict) else {}
    for part in parts:
        tag = next((name for name in TAGS if name in part.model_fields), None)
        if tag is not None and given.get(tag) in _choices(part.model_fields[tag].annotation):
            return part
    return None


def _annotation_at(place: YamlPath, data: Any) -> Any:
    """Return the schema at `place`; branches of unions are chosen by the file's content."""
    annotation: Any = MappingFile
    value = data
    for step in place:
        if isinstance(step, int):
            items = next(get_args(option) for option in _options(annotation) if _kind(option) == "list")
            annotation = items[0] if items[-1] is Ellipsis else items[step]
        else:
            part = _part(annotation, value)
            assert part is not None
            annotation = part.model_fields[step].annotation
        value = _step(value, step)
    return annotation


def _follow(location: Sequence[str | int], data: Any) -> tuple[YamlPath, list[tuple[YamlPath, str]]]:
    """Split pydantic's location into the place in the file and the labels of union branches met on the way."""
    place: YamlPath = ()
    branches: list[tuple[YamlPath, str]] = []
    value = data
    for index, step in enumerate(location):
        inner = _step(value, step)
        is_last = index == len(location) - 1
        missing_here = is_last and isinstance(value, dict | tuple) and not _is_branch(step)
        if inner is not _MISSING or missing_here:
            place = (*place, step)
            value = inner
        else:
            branches.append((place, str(step)))
    return place, branches


def _is_branch(step: str | int) -> bool:
    return isinstance(step, str) and ("[" in step or step[:1].isupper() or step in ("str", "int", "float", "bool"))


def _step(value: Any, step: str | int) -> Any:
    if isinstance(value, dict) and isinstance(step, str):
        return value.get(step, _MISSING)
    if isinstance(value, tuple) and isinstance(step, int) and step < len(value):
        return value[step]
    return _MISSING


def _value_at(place: YamlPath, data: Any) -> Any:
    for step in place:
        data = _step(data, step)
    return None if data is _MISSING else data


def _branch_fits(label: str, value: Any) -> bool:
    """Say whether a union branch with pydantic's `label` is the one that `value` was written for."""
    if label.startswith("tuple["):
        return isinstance(value, tuple)
    if label.startswith("literal[") or label == "str":
        return isinstance(value, str)
    if label in ("int", "float") or "[_number()" in label:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, dict)


def _some_branch_fits(annotation: Any, value: Any) -> bool:
    kinds = {_kind(option) for option in _options(annotation)}
    if isinstance(value, str):
        return bool(kinds & {"choice", "text"})
    if isinstance(value, tuple):
        return "list" in kinds
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(kinds & {"number", "whole"})
    return isinstance(value, dict) and bool(kinds & {"mapping", "values"})
