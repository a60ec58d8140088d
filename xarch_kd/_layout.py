"""Location of the folders beside the package, in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """Return `<package>/name` if that is a folder (a wheel), else `<package>/../name` (a checkout)."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
