"""The licence that a teacher's checkpoint states for itself."""

from __future__ import annotations

import re

from xarch_kd.models.loading.gguf import gguf_metadata
from xarch_kd.models.loading.reference import resolve

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
LICENCE = re.compile(r"^license:\s*['\"]?([\w.-]+)", re.MULTILINE)


def licence_of(reference: str, revision: str | None = None) -> str | None:
    """Return the licence's identifier from a GGUF file's metadata or a folder's model card, or None."""
    source = resolve(reference, revision)
    if source.kind == "gguf" and source.path is not None:
        value = gguf_metadata(source.path)[0].get("general.license")
        return value if isinstance(value, str) else None
    if source.kind == "folder" and source.path is not None:
        card = source.path / "README.md"
        front = FRONT_MATTER.match(card.read_text(encoding="utf-8")) if card.is_file() else None
        found = LICENCE.search(front.group(1)) if front else None
        return found.group(1) if found else None
    from huggingface_hub import model_info

    return getattr(model_info(source.name, revision=source.revision).card_data, "license", None)
