"""Text of a mapping file; only the standard library is imported, so that a missing file is reported at once."""

from __future__ import annotations

from pathlib import Path

from xarch_kd.errors import MappingFileError
from xarch_kd.mapping_file.source_map import shortened

MAXIMUM_BYTES = 2**20


def read_mapping_text(path: Path) -> str:
    """Return the text of a mapping file. Raises `MappingFileError` for one that is missing, too large or not UTF-8."""
    if "\n" in str(path):
        first = str(path).splitlines()[0]
        raise MappingFileError([f"{shortened(first)}: this is text, not a path. Give yaml.safe_load(text), a dict."])
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES + 1)
    except FileNotFoundError:
        raise MappingFileError([f"{path}: there is no such file. `xarch-kd init TEACHER` writes one."]) from None
    except IsADirectoryError:
        raise MappingFileError([f"{path}: this is a folder, not a mapping file"]) from None
    except (OSError, ValueError) as error:
        raise MappingFileError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    if len(content) > MAXIMUM_BYTES:
        raise MappingFileError([f"{path}: larger than {MAXIMUM_BYTES} bytes, which no mapping file needs to be"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise MappingFileError([f"{path}:{line}:{column}: not UTF-8 text"]) from None
