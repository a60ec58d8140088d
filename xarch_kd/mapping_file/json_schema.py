"""The mapping file's JSON Schema for editors: `python -m xarch_kd.mapping_file.json_schema` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from xarch_kd._layout import folder
from xarch_kd.mapping_file.schema import MappingFile

FILE_NAME = "mapping.schema.json"


def json_schema() -> dict[str, Any]:
    """Return the schema as JSON Schema draft 7, the newest draft that YAML editors understand."""
    schema = MappingFile.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_draft_7(schema),
        "definitions": {name: _draft_7(part) for name, part in definitions.items()},
    }


def schema_text() -> str:
    """Return the content of `mappings/mapping.schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def main(path: Path | None = None) -> None:
    """Write the schema to `path`, by default into the folder of mapping files."""
    target = path or folder("mappings") / FILE_NAME
    target.write_text(schema_text(), encoding="utf-8")
    print(target)


def _draft_7(node: Any) -> Any:
    """Return `node` in draft 7, which has neither fixed-length lists nor discriminators."""
    if isinstance(node, list):
        return [_draft_7(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _draft_7(value) for key, value in node.items() if key not in ("discriminator", "prefixItems")}
    if "prefixItems" in node:
        result["items"] = _draft_7(node["prefixItems"])
    return result


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
