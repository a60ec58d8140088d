from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xarch_kd._layout import folder
from xarch_kd.mapping_file.json_schema import FILE_NAME, json_schema, main, schema_text


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (folder("mappings") / FILE_NAME).read_text(encoding="utf-8")
    assert committed == schema_text(), "stale: run python -m xarch_kd.mapping_file.json_schema"


def test_every_reference_leads_somewhere_and_no_keyword_is_newer_than_draft_7() -> None:
    schema = json_schema()
    seen = 0
    for node in _nodes(schema):
        assert not {"prefixItems", "discriminator", "$defs", "dependentSchemas"} & set(node)
        if "$ref" in node:
            seen += 1
            assert node["$ref"].removeprefix("#/definitions/") in schema["definitions"]
    assert seen > 5


def test_foreign_keys_are_refused_in_the_editor_too() -> None:
    schema = json_schema()
    objects = [part for part in (schema, *schema["definitions"].values()) if part.get("type") == "object"]
    assert objects and all(part["additionalProperties"] is False for part in objects)


def test_main_writes_where_it_is_told(tmp_path: Path) -> None:
    main(tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text(encoding="utf-8")) == json_schema()


def _nodes(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(node for item in value.values() for node in _nodes(item))]
    return [node for item in value for node in _nodes(item)] if isinstance(value, list) else []
