"""Records of text sources with their place, and files of plain text in blocks and lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final

from xarch_kd.data.paths import DataFile
from xarch_kd.errors import DataError

BOM: Final = b"\xef\xbb\xbf"
# Marks of UTF-32 and UTF-16, which are text of another encoding.
OTHER_BOMS: Final = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Bytes of a line, a row or an object; files of plain text have no bound.
LONGEST_RECORD: Final = 64 * 2**20
BLOCK: Final = 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its source has it: values by column, or for plain text the characters in pieces.

    `place` is the file with line and column or row, for messages. `names` are all columns of the source, where `values`
    leaves out some that nothing reads.
    """

    place: str
    values: Mapping[str, Any] | None = None
    pieces: Iterable[str] = ()
    names: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns of the source."""
        return self.names or tuple(self.values or ())


def text_records(file: DataFile) -> Iterator[Record]:
    """Yield a file of plain text as one record; line ends become newlines, and a byte order mark is dropped."""
    yield Record(str(file.path), pieces=_normalized(file))


def _normalized(file: DataFile) -> Iterator[str]:
    held = ""
    with file.opened() as stream:
        for block in decoded_blocks(file, stream):
            text = held + block
            held = "\r" if text.endswith("\r") else ""
            text = text.removesuffix(held).replace("\r\n", "\n")
            if text:
                yield text
    if held:
        yield held


def decoded_blocks(file: DataFile, stream: IO[bytes]) -> Iterator[str]:
    """Yield the characters of a file in blocks. Raises DataError for NUL bytes and for what is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    block = stream.read(BLOCK)
    start = _without_bom(file, block)
    offset, line, column = len(block) - len(start), 1, 1
    block = start
    while True:
        at = block.find(b"\0")
        if at >= 0:
            raise _binary(f"{file.path}: a NUL byte at offset {offset + at:,}")
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            before = (pending + block)[: error.start].decode()
            place = f"{file.path}:{line + before.count(chr(10))}:{_column_after(before, column)}"
            raise _not_utf8(place, error) from error
        if text:
            yield text
            column = _column_after(text, column)
            line += text.count("\n")
        if not block:
            return
        offset += len(block)
        block = stream.read(BLOCK)


def _column_after(text: str, column: int) -> int:
    """Return the column after `text`, which begins at `column` of its line."""
    at = text.rfind("\n")
    return len(text) - at if at >= 0 else column + len(text)


def decoded_lines(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1; they end at newlines alone.

    Raises DataError for NUL bytes, for what is not UTF-8, and for a line of more than 64 MiB.
    """
    number = offset = 0
    while line := stream.readline(LONGEST_RECORD + 1):
        number += 1
        if len(line) > LONGEST_RECORD:
            raise too_long(f"{file.path}:{number}")
        at = line.find(b"\0")
        if at >= 0 and not (number == 1 and line.startswith(tuple(OTHER_BOMS))):
            raise _binary(f"{file.path}:{number}:{at + 1}: a NUL byte at offset {offset + at:,}")
        offset += len(line)
        if number == 1:
            line = _without_bom(file, line)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode()) + 1
            raise _not_utf8(f"{file.path}:{number}:{column}", error) from error
        yield number, text


def _without_bom(file: DataFile, start: bytes) -> bytes:
    """Return the first bytes of a file without a mark of UTF-8. Raises DataError for a mark of another encoding."""
    for mark, encoding in OTHER_BOMS.items():
        if start.startswith(mark):
            raise DataError(
                f"cannot read {file.path} as UTF-8 text",
                found=f"{encoding}, or no text: the first bytes are {start[:4].hex(' ')}",
                allowed="UTF-8",
                fix=f"if it is text: iconv -f {encoding} -t UTF-8 '{file.path}' > new-file",
            )
    return start.removeprefix(BOM)


def _binary(what: str) -> DataError:
    return DataError(
        what,
        allowed="text in UTF-8, or a format that the file's suffix names",
        fix="leave files out that are no text (weights, images, archives), or write a damaged one again",
    )


def _not_utf8(place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{place}: cannot read as UTF-8 text",
        found=f"byte 0x{error.object[error.start]:02x}: {error.reason}",
        allowed="text in UTF-8",
        fix="convert the file (iconv -f ENCODING -t UTF-8), or leave it out if it is no text",
    )


def too_long(place: str) -> DataError:
    """Return the error for a record of more than `LONGEST_RECORD` bytes."""
    return DataError(
        f"{place}: a record that is too long",
        found=f"more than {LONGEST_RECORD // 2**20} MiB",
        allowed=f"at most {LONGEST_RECORD // 2**20} MiB in a line, a row or an object; plain text (.txt) has no bound",
        fix="split the document, or give it as a file of plain text",
    )


def refused_characters(text: str) -> str | None:
    """Return the reason for which a text is not tokenized, a NUL character or a lone surrogate; None if it can be."""
    at = text.find("\0")
    if at >= 0:
        return f"a NUL character after {at:,} characters: binary data, or damaged text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"a lone surrogate \\u{ord(text[error.start]):04x} after {error.start:,} characters: "
            "half of a character that was cut in two"
        )
    return None
