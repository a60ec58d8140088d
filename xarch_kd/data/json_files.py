"""Records of JSON files: one object per line, one array of objects, or one object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

from xarch_kd.data.paths import DataFile
from xarch_kd.data.records import LONGEST_RECORD, Record, decoded_blocks, decoded_lines, too_long
from xarch_kd.errors import DataError

# Escapes of surrogates: a pair has the second group.
_SURROGATE: Final = re.compile(r"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|[c-fC-F])")
# A value may be cut in an escape or a word that is no longer than this.
LONGEST_WORD: Final = 16


def jsonl_records(file: DataFile) -> Iterator[Record]:
    """Yield the object of each line that is not blank. Raises DataError with file, line and column."""
    with file.opened() as stream:
        for number, line in decoded_lines(file, stream):
            if not line.strip():
                continue
            place = f"{file.path}:{number}"
            try:
                value = json.loads(line, object_pairs_hook=_unique)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}:{error.pos + 1}: not a line of JSON",
                    found=error.msg,
                    fix="name a file that is one array or one object .json" if line.strip() in "[{" else None,
                ) from error
            except (_RepeatedKeyError, RecursionError) as error:
                raise DataError(f"{place}: not a line of JSON that can be read", found=str(error)) from error
            _check_surrogates(line, value, lambda at, number=number: f"{file.path}:{number}:{at + 1}")
            yield _record(value, place)


def json_records(file: DataFile) -> Iterator[Record]:
    """Yield the objects of a file that is one array of objects, or one object. Errors as in `jsonl_records`."""
    with file.opened() as stream:
        source = _JsonText(file, stream)
        if source.next_character() == "[":
            source.skip()
            while source.next_character() != "]":
                place = source.place()
                yield _record(source.value(), place)
                if source.next_character() == ",":
                    source.skip()
                    if source.next_character() == "]":
                        raise source.error("a comma before the end of the array")
                elif source.next_character() != "]":
                    raise source.error("neither a comma nor the end of the array after a value")
            source.skip()
        elif source.next_character():
            place = source.place()
            yield _record(source.value(), place)
        if source.next_character():
            raise source.error("text after the end; a file with one object per line is named .jsonl")


class _JsonText:
    """Characters of a JSON file, of which only those of the value that is read are held."""

    def __init__(self, file: DataFile, stream: IO[bytes]) -> None:
        self._file, self._blocks = file, decoded_blocks(file, stream)
        self._text, self._at = "", 0
        self._line = self._column = 1  # of the first held character
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique)

    def next_character(self) -> str:
        """Return the next character that is no blank, or an empty string at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(1):
                return ""

    def skip(self) -> None:
        """Go over one character."""
        self._at += 1

    def value(self) -> Any:
        """Return the JSON value that begins here, and go over it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - LONGEST_WORD
                if not is_cut or not self._more(len(self._text) - self._at):
                    raise self.error(error.msg, min(error.pos, len(self._text))) from error
            except (_RepeatedKeyError, RecursionError) as error:
                raise self.error(str(error)) from error
        start = self._at
        if end - start > LONGEST_RECORD:
            raise too_long(self.place())
        _check_surrogates(self._text[start:end], value, lambda at: self.place(start + at))
        self._at = end
        return value

    def place(self, at: int | None = None) -> str:
        """Return file, line and column of a held character, by default of the next one."""
        line, column = self._position(self._at if at is None else at)
        return f"{self._file.path}:{line}:{column}"

    def error(self, reason: str, at: int | None = None) -> DataError:
        """Return the error for JSON that cannot be read."""
        return DataError(
            f"{self.place(at)}: not a JSON file", found=reason, allowed="one array of objects, or one object"
        )

    def _position(self, at: int) -> tuple[int, int]:
        newlines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at) if newlines else self._column + at
        return self._line + newlines, column

    def _more(self, characters: int) -> bool:
        """Hold at least so many characters more, and forget those before the next one; False at the end of the file."""
        self._line, self._column = self._position(self._at)
        parts, size = [self._text[self._at :]], 0
        self._text, self._at = parts[0], 0
        for block in self._blocks:
            parts.append(block)
            size += len(block)
            if size >= characters:
                break
        self._text = "".join(parts)
        if len(parts[0]) > LONGEST_RECORD:
            raise too_long(self.place())
        return size > 0


class _RepeatedKeyError(ValueError):
    """A JSON object that has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(f"the key '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return values


def _check_surrogates(raw: str, value: Any, place: Callable[[int], str]) -> None:
    """Raise DataError for a value with half of a surrogate pair, which only an escape in `raw` can bring."""
    if _SURROGATE.search(raw) is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        found = next((match for match in _SURROGATE.finditer(raw) if match.group(1) is None), None)
        at = found.start() if found is not None else 0
        raise DataError(
            f"{place(at)}: a lone surrogate, half of a character that was cut in two",
            found=raw[at : at + 6],
            fix="write the file again from the whole text, or leave the half character out",
        ) from None


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: not an object", found=type(value).__name__, allowed='objects, e.g. {"text": "…"}')
    return Record(place, value)
