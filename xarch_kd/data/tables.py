"""Records of tables: CSV and TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from xarch_kd.data.paths import DataFile
from xarch_kd.data.records import LONGEST_RECORD, Record, decoded_lines, too_long
from xarch_kd.errors import DataError

# Rows that are Python objects at once: as many as this, or fewer where they are longer.
ROWS: Final = 512
ROW_BYTES: Final = 4 * 2**20


def csv_records(file: DataFile) -> Iterator[Record]:
    """Yield the rows of a file with a header. Raises DataError with file and line."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD))
    delimiter = "\t" if file.format == "tsv" else ","
    with file.opened() as stream:
        rows = csv.reader((line for _, line in decoded_lines(file, stream)), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) != len(header):
                raise DataError(f"{file.path}:1: the header has a column twice", found=", ".join(header)[:200])
            after = rows.line_num
            for row in rows:
                # A row of several lines is named by its first.
                place, after = f"{file.path}:{after + 1}", rows.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{place}: a row has another number of columns than the header",
                        found=f"{len(row)}, but the header has {len(header)}: {', '.join(header)[:200]}",
                        fix="put values with delimiters or line ends into double quotes",
                    )
                yield Record(place, dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise DataError(f"{file.path}:{rows.line_num}: not a row of {file.format.upper()}", found=error) from error


def parquet_records(file: DataFile, wanted: Collection[str]) -> Iterator[Record]:
    """Yield the rows of a Parquet file with those of its columns that are `wanted`. Raises DataError with the file."""
    parquet = importlib.import_module("pyarrow.parquet")
    with file.seekable() as stream, _errors(file):
        table = parquet.ParquetFile(stream)
        names = tuple(table.schema_arrow.names)
        batches = table.iter_batches(batch_size=ROWS, columns=[name for name in names if name in wanted])
        yield from table_rows(str(file.path), batches, names)


def arrow_records(file: DataFile, wanted: Collection[str]) -> Iterator[Record]:
    """Yield the rows of an Arrow file, of either IPC format, as `parquet_records` does."""
    arrow = importlib.import_module("pyarrow")
    with file.seekable() as stream, _errors(file):
        is_random = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_random:
            table = arrow.ipc.open_file(stream)
            batches: Iterable[Any] = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            table = batches = arrow.ipc.open_stream(stream)
        names = tuple(table.schema.names)
        chosen = [name for name in names if name in wanted]
        yield from table_rows(str(file.path), (batch.select(chosen) for batch in batches), names)


def table_rows(place: str, batches: Iterable[Any], names: tuple[str, ...], *, first: int = 0) -> Iterator[Record]:
    """Yield the rows of Arrow record batches, numbered from 1, or after the `first` rows of the table."""
    number = first
    for batch in batches:
        rows = max(1, min(ROWS, batch.num_rows * ROW_BYTES // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            # A table without a wanted column has rows all the same.
            values = part.to_pylist() if part.num_columns else [{}] * part.num_rows
            for row in values:
                number += 1
                if any(isinstance(value, str) and len(value) > LONGEST_RECORD for value in row.values()):
                    raise too_long(f"{place}: row {number}")
                yield Record(f"{place}: row {number}", {name: without_missing(row[name]) for name in row}, names=names)


def without_missing(value: Any) -> Any:
    """Return a value without keys that are None: a column of structs has every key in every row."""
    if isinstance(value, dict):
        return {key: without_missing(inner) for key, inner in value.items() if inner is not None}
    return [without_missing(inner) for inner in value] if isinstance(value, list) and _nested(value) else value


def _nested(values: list[Any]) -> bool:
    return any(isinstance(value, dict | list) for value in values[:1])


@contextmanager
def _errors(file: DataFile) -> Iterator[None]:
    """Raise what the reader of tables raises as a DataError with the file."""
    arrow = importlib.import_module("pyarrow")
    try:
        yield
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {file.path} as {file.format.capitalize()}",
            found=str(error).splitlines()[0][:300],
            fix="copy the file again, or name it by the format that it has",
        ) from error
