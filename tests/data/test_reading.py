"""Files of every format to records: the right values, and messages with file, line and column for bad input."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from xarch_kd.data.paths import DataFile, find_files
from xarch_kd.data.reading import read_records
from xarch_kd.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": "a\u2028b\u2029c\u0085d", "other": 1},
    {"text": "café \U0001f600\r\nx", "other": 2},
]


def texts(path: Path) -> list[str]:
    records = list(read_records(DataFile.of(path), {"text"}))
    return ["".join(record.pieces) if record.values is None else record.values["text"] for record in records]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return ("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\n").encode()


def _json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    lines = ["other,text", *(f'{row["other"]},"{row["text"]}"' for row in rows)]
    return ("\ufeff" + "\r\n".join(lines)).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _arrow_file(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _arrow_stream(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _zst(content: bytes) -> bytes:
    import zstandard

    half = len(content) // 2  # two frames, as appending writes them
    return zstandard.ZstdCompressor().compress(content[:half]) + zstandard.ZstdCompressor().compress(content[half:])


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": _jsonl,
    "a.NDJSON": _jsonl,
    "a.json": _json,
    "a.CSV": _csv,
    "a.tsv": lambda rows: _csv(rows).replace(b"other,", b"other\t").replace(b',"', b'\t"'),
    "a.parquet": _parquet,
    "a.arrow": _arrow_file,
    "b.arrow": _arrow_stream,
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress, _zst], ids=["plain", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_each_format_returns_the_texts_that_were_written(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + {bytes: "", gzip.compress: ".gz"}.get(compress, ".zst"))
    path.write_bytes(compress(WRITERS[name](ROWS)))
    assert texts(path) == [row["text"] for row in ROWS]


def test_plain_text_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufeffone\r\ntwo\u2028\x85é\r".encode())
    assert texts(tmp_path / "a.md") == ["one\ntwo\u2028\x85é\r"]


def test_plain_text_is_read_in_pieces_that_cut_no_character_and_no_line_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xarch_kd.data.records.BLOCK", 3)
    (tmp_path / "a.txt").write_bytes("ab\r\n€\r\nend\r\n".encode())
    pieces = [list(record.pieces) for record in read_records(DataFile.of(tmp_path / "a.txt"), ())]
    assert "".join(pieces[0]) == "ab\n€\nend\n" and len(pieces[0]) > 3


def test_a_json_array_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xarch_kd.data.records.BLOCK", 7)
    rows = [{"text": "é" * number, "tags": [True, None, 1.5e3]} for number in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert texts(tmp_path / "a.json") == [row["text"] for row in rows]
    (tmp_path / "b.json").write_text(' {"text": "one"}\n', encoding="utf-8")
    assert texts(tmp_path / "b.json") == ["one"]
    (tmp_path / "c.json").write_text("[]", encoding="utf-8")
    assert texts(tmp_path / "c.json") == []


def test_places_are_lines_and_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"},\n {"text": "b"}]')
    (tmp_path / "a.csv").write_bytes(b'text\n"a\nb"\nc\n')
    (tmp_path / "a.parquet").write_bytes(_parquet(ROWS))
    places = {
        path.name: [record.place.removeprefix(str(path)) for record in read_records(DataFile.of(path), ())]
        for path in sorted(tmp_path.iterdir())
    }
    assert places == {
        "a.csv": [":2", ":4"],
        "a.json": [":1:2", ":2:2"],
        "a.jsonl": [":1", ":3"],
        "a.parquet": [": row 1", ": row 2"],
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "cut emoji \\ud83d"}', r"a\.jsonl:2:21: a lone surrogate[\s\S]*ud83d"),
        ("a.json", b'[{"text": "\\ud83d\\ude00"},\n{"text": "\\ude00"}]', r"a\.json:2:11: a lone surrogate"),
        ("a.jsonl", b'{"text": "a"}\nnot json', r"a\.jsonl:2:1: not a line of JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: not an object\n  found:   list"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"a\.jsonl:1: not a line[\s\S]*the key 'text' is given twice"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not a line of JSON that can be read"),
        ("a.jsonl", b'{\n"text": "a"\n}', r"a\.jsonl:1:[\s\S]*name a file that is one array or one object \.json"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a\.json:1:16: not a JSON file\n  found:   neither a comma"),
        ("a.json", b'[{"text": "a"},]', r"a\.json:1:16: not a JSON file\n  found:   a comma before the end"),
        ("a.json", b'[{"text": "a"', r"a\.json:1:14: not a JSON file"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"a\.json:2:1:[\s\S]*one object per line is named \.jsonl"),
        ("a.json", b"[1]", r"a\.json:1:2: not an object"),
        (
            "a.csv",
            b"text,other\na,b\nc\n",
            r"a\.csv:3: a row has another number of columns[\s\S]*1, but the header has 2",
        ),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: the header has a column twice"),
        ("a.csv", b'text\n"open\n', r"a\.csv:2: not a row of CSV"),
        ("a.txt", b"ab\ncd\0", r"a\.txt: a NUL byte at offset 5"),
        ("a.jsonl", b'{"text": "a"}\n{"te\0', r"a\.jsonl:2:5: a NUL byte at offset 18"),
        ("a.txt", b"ab\nc\xffd", r"a\.txt:2:2: cannot read as UTF-8 text\n  found:   byte 0xff"),
        ("a.txt", "é".encode()[:1], r"a\.txt:1:1: cannot read as UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"\xc3\xa9": "\xe9"}', r"a\.jsonl:2:8: cannot read as UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), r"as UTF-8 text\n  found:   UTF-16[\s\S]*iconv -f UTF-16"),
        (
            "a.txt.gz",
            gzip.compress(b"long " * 100, mtime=0)[:-4],
            r"cannot read .*a\.txt\.gz[\s\S]*copy the file again",
        ),
        ("a.txt.gz", b"plain", r"cannot read .*a\.txt\.gz"),
        ("a.txt.zst", _zst(b"long " * 100)[:-4], r"cannot read .*a\.txt\.zst"),
        ("a.txt.zst", b"plain", r"cannot read .*a\.txt\.zst"),
        ("a.parquet", _parquet(ROWS)[:-9], r"cannot read .*a\.parquet as Parquet"),
        ("a.arrow", b"not arrow at all", r"cannot read .*a\.arrow as Arrow"),
        ("a.tar.gz", b"", r"a\.tar\.gz is an archive"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_record_without_an_end_is_refused_before_all_of_it_is_held(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("records", "json_files", "tables"):
        monkeypatch.setattr(f"xarch_kd.data.{module}.LONGEST_RECORD", 2**20)
    start = {"a.csv": b'text\n"'}.get(name, b'{"text": "')
    (tmp_path / name).write_bytes(start + b"x" * 2**23)
    with pytest.raises(DataError, match=rf"{name}:\d.*: a record that is too long[\s\S]*plain text"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_the_bound_of_a_record_is_the_same_in_every_format(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("records", "json_files", "tables"):
        monkeypatch.setattr(f"xarch_kd.data.{module}.LONGEST_RECORD", 3000)
    for length, is_read in ((2900, True), (3100, False)):
        text = "x" * length
        if name == "a.parquet":
            Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / name)
        else:
            content = {"a.jsonl": json.dumps({"text": text}), "a.json": json.dumps([{"text": text}])}
            (tmp_path / name).write_text(content.get(name, f"text\n{text}\n"))
        if is_read:
            assert texts(tmp_path / name) == [text]
        else:
            with pytest.raises(DataError, match=rf"{name}:.*1.*: a record that is too long|{name}:2: a record"):
                texts(tmp_path / name)


def test_folders_lists_and_patterns_name_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a [1].txt", "sub/c.md", "sub/deep/d.jsonl.gz", "e.py", ".hidden.txt", "sub/.git/f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b'{"text": "d"}') if name.endswith(".gz") else name.encode())

    def names(*patterns: str) -> list[str]:
        found = find_files([str(tmp_path / pattern) for pattern in patterns])
        return [str(file.path.relative_to(tmp_path)) for file in found.files]

    assert names(".") == ["a [1].txt", "b.txt", "sub/c.md", "sub/deep/d.jsonl.gz"]
    assert names("a [1].txt") == ["a [1].txt"]
    assert names("e.py", "[ab]*.txt") == ["e.py", "a [1].txt", "b.txt"]
    assert names("su*") == ["sub/c.md", "sub/deep/d.jsonl.gz"]
    found = find_files([str(tmp_path / "*.txt"), str(tmp_path)])
    assert len(found.files) == 4
    assert any("2 files of" in notice and "read once" in notice for notice in found.notices)
    assert any("other suffixes are not read: .py" in notice for notice in found.notices)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("absent/*.txt", r"a file pattern matches nothing[\s\S]*absent/\*\.txt"),
        ("code", r"the folder .*code has no data file\n  found:   files with other suffixes: \.py"),
        ("empty", r"the folder .*empty has no data file\n  found:   no file"),
        ("saved", r"was written by save_to_disk[\s\S]*dataset: .*saved"),
        ("broken.txt", r"broken\.txt is not a file that can be read"),
    ],
)
def test_names_without_data_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    for name in ("code/a.py", "saved/state.json", "saved/data.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / pattern)])


def test_columns_of_structs_lose_the_keys_that_a_row_does_not_have(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "other": 1},
        {"messages": [{"role": "assistant", "content": "b", "name": "n"}], "other": 2},
    ]
    (tmp_path / "a.parquet").write_bytes(_parquet(rows))
    records = list(read_records(DataFile.of(tmp_path / "a.parquet"), {"messages"}))
    assert [record.values for record in records] == [{"messages": row["messages"]} for row in rows]
    assert records[0].columns == ("messages", "other")
