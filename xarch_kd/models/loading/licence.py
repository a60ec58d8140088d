"""Licence that a teacher's checkpoint declares."""

from __future__ import annotations

import yaml
from huggingface_hub import metadata_load

from xarch_kd.models.loading.gguf_header import read_gguf_header
from xarch_kd.models.loading.reference import resolve


def licence_of(reference: str, revision: str | None = None) -> str | None:
    """Return the licence's identifier from a GGUF file's metadata or a model card, or None if there is none."""
    source = resolve(reference, revision)
    if source.kind == "gguf" and source.path is not None:
        return _text(read_gguf_header(source.path).metadata.get("general.license"))
    if source.kind == "folder" and source.path is not None:
        card = source.path / "README.md"
        try:
            metadata = metadata_load(card) if card.is_file() else None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError):
            return None
        return _text((metadata or {}).get("license"))
    from huggingface_hub import model_info

    return _text(getattr(model_info(source.name, revision=source.revision).card_data, "license", None))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
