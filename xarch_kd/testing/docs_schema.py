"""Reference page of the mapping file, generated from its JSON Schema and the meanings of its keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from xarch_kd.mapping_file.json_schema import json_schema
from xarch_kd.mapping_file.key_help import KEYS

ROOT = "MappingFile"
ABOUT = """\
# Mapping file: every key

Generated from the schema. [The how-to pages](../how-to/convert.md) show the keys in use. Keys without a default must be
given. `null` means that the key is left out.

| section | place in the file |
|---|---|
"""
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def mapping_file_page() -> str:
    """Return the page: one section for each part of the file, in the order of first mention."""
    schema = json_schema()
    parts = {ROOT: schema, **schema["definitions"]}
    places = dict(_places(schema, parts))
    contents = [f"| [{name}](#{name.lower()}) | {_place(places[name])} |" for name in places]
    return ABOUT + "\n".join(contents) + "\n\n" + "\n".join(_section(name, parts[name]) for name in places)


def sections() -> dict[str, list[str]]:
    """Return the keys of each part of the schema."""
    schema = json_schema()
    parts = {ROOT: schema, **schema["definitions"]}
    return {name: list(part.get("properties", {})) for name, part in parts.items()}


def _place(place: str) -> str:
    return f"`{place}`" if place else "the whole file"


def _places(schema: dict[str, Any], parts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each part with its first place in a file, depth first."""
    seen: set[str] = set()

    def visit(name: str, place: str) -> Iterator[tuple[str, str]]:
        if name in seen:
            return
        seen.add(name)
        yield name, place
        for key, value in parts[name].get("properties", {}).items():
            inner = f"{place}.{key}" if place else key
            for each, is_list in _references(value):
                yield from visit(each, f"{inner}[]" if is_list else inner)

    yield from visit(ROOT, "")


def _references(node: Any, is_list: bool = False) -> Iterator[tuple[str, bool]]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2], is_list
        for key, value in node.items():
            if key not in ("default", "properties"):
                yield from _references(value, is_list or key == "items")
    elif isinstance(node, list):
        for value in node:
            yield from _references(value, is_list)


def _section(name: str, part: dict[str, Any]) -> str:
    about = re.split(r"\n\s*>>>", part.get("description", ""))[0]
    required = part.get("required", [])
    rows = []
    for key, value in part.get("properties", {}).items():
        meaning, unit = _help(name, key)
        default = "required" if key in required else _default(value)
        rows.append(f"| `{key}` | {_type(value)} | {default} | {unit} | {meaning} |")
    table = ["| key | value | default | unit | meaning |", "|---|---|---|---|---|", *rows]
    return "\n".join([f"## {name}\n", " ".join(about.split()).replace("<", "&lt;") + "\n", *table, ""])


def _help(name: str, key: str) -> tuple[str, str]:
    text = KEYS.get(name, {}).get(key) or KEYS["*"].get(key, "")
    found = re.fullmatch(r"(.*?)(?: \[([^\]]+)\])?", text)
    assert found is not None
    return cell(found[1]), found[2] or ""


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return "see above"
    default = value["default"]
    if isinstance(default, dict):
        return "its own defaults"
    return f"`{cell(json.dumps(default, ensure_ascii=False))}`"


def _type(value: dict[str, Any]) -> str:
    """Return the allowed values in a table cell."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in value:
            return " or ".join(dict.fromkeys(_type(one) for one in value[key]))
    if "const" in value or "enum" in value:
        allowed = value.get("enum") or [value["const"]]
        return ", ".join(f"`{json.dumps(one).strip(chr(34))}`" for one in allowed)
    limits = " ".join(f"{sign} {value[key]:g}" for key, sign in _LIMITS.items() if key in value)
    match value.get("type"):
        case "array" if isinstance(value.get("items"), dict):
            return f"list of {_type(value['items'])}"
        case "array":
            return "list"
        case "object":
            return "mapping"
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case kind:
            name = {"integer": "whole number", "number": "number", "string": "text"}.get(str(kind), "any value")
            return f"{name} {limits}".strip()


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
