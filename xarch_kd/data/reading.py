"""Records of a data file by its format."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from xarch_kd.data.json_files import json_records, jsonl_records
from xarch_kd.data.paths import DataFile
from xarch_kd.data.records import Record, text_records
from xarch_kd.data.tables import arrow_records, csv_records, parquet_records
from xarch_kd.errors import XarchError


def read_records(file: DataFile, wanted: Collection[str]) -> Iterator[Record]:
    """Yield the records of a file in order; a table's with those of its columns that are `wanted`.

    Raises DataError with the file and, where it has them, line and column (from 1), for bytes that are no UTF-8 text or
    hold a NUL, for what does not have the form that the suffix stands for, and for a record of more than 64 MiB.
    """
    match file.format:
        case "text":
            return text_records(file)
        case "jsonl":
            return jsonl_records(file)
        case "json":
            return json_records(file)
        case "csv" | "tsv":
            return csv_records(file)
        case "parquet":
            return parquet_records(file, wanted)
        case "arrow":
            return arrow_records(file, wanted)
        case _:
            raise XarchError("A format without a reader. This is a bug in xarch-kd.", found=file.format)
