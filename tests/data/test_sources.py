"""Text sources to tokenized documents: the token store, what it was made from, damage, full disks, datasets."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from xarch_kd.data import identity, sources
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.sources import open_documents
from xarch_kd.data.tokenization import DocumentTokenizer
from xarch_kd.errors import DataError, UsageError
from xarch_kd.mapping_file.schema import Text
from xarch_kd.run.report import Reporter
from xarch_kd.testing.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = "{% for message in messages %}{{ message.role + ':' + message.content + '\n' }}{% endfor %}"
    return made


class Opened:
    """Documents of a source, their texts, what was printed, and whether they were tokenized for it."""

    def __init__(self, text: Text, made: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[Path] = []
        plain = sources._write
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_write", lambda folder, *rest: (written.append(folder), plain(folder, *rest)))
            output = io.StringIO()
            reporter = Reporter(Console(file=output, width=200))
            self.documents: TokenizedDocuments = open_documents(text, made, reporter=reporter, cache=cache)
        self.printed, self.is_new = output.getvalue(), bool(written)
        self.texts = [made.decode(self.documents.ids(number)) for number in range(len(self.documents))]


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_text(text: Text, made: Any = None) -> Opened:
        return Opened(text, made or tokenizer, tmp_path / "cache", monkeypatch)

    return open_text


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_is_tokenized_once_for_its_content_tokenizer_and_settings(opened: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    text = Text(files=(str(path),))
    first = opened(text)
    assert first.is_new and first.texts == ["one<|end|>", "two<|end|>"]
    expected = TokenizedDocuments.of([first.documents.ids(0).tolist(), first.documents.ids(1).tolist()])
    assert first.documents.fingerprint == expected.fingerprint and not first.documents.has_labels
    assert "1 texts without a character" in first.printed
    again = opened(text)
    assert not again.is_new and again.texts == first.texts and again.printed == first.printed
    assert opened(Text(files=(str(path),), eos="never")).texts == ["one", "two"]
    other = tiny_tokenizer()
    other.add_tokens(["one"])
    assert opened(text, other).is_new
    write(path, [{"text": "one"}, {"text": ""}, {"text": "six"}])
    changed = opened(text)
    assert changed.is_new and changed.texts == ["one<|end|>", "six<|end|>"]
    assert changed.documents.hashes[0] == first.documents.hashes[0]


def test_a_file_that_did_not_change_is_not_read_again(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -60.0)
    path = write(tmp_path / "a.jsonl", [{"text": "one"}])
    opened(Text(files=(str(path),)))
    with monkeypatch.context() as patch:
        patch.setattr(identity.hashlib, "file_digest", None)
        assert not opened(Text(files=(str(path),))).is_new
    # The same size and modification time, as tools that copy them write.
    state = path.stat()
    write(path, [{"text": "two"}])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert opened(Text(files=(str(path),))).texts == ["two<|end|>"]


def test_labels_are_stored_with_the_tokens(opened: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": [5, 6]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8]}]
    documents = opened(Text(files=(str(write(tmp_path / "a.jsonl", rows)),))).documents
    counted = [documents.counted(number) for number in range(3)]
    assert [mask.tolist() for mask in counted if mask is not None] == [[True, True], [False, True, True], [True]]
    fingerprint = TokenizedDocuments.of([[5, 6], [5, 6, 7], [8]], [[True] * 2, [False, True, True], [True]]).fingerprint
    assert documents.fingerprint == fingerprint
    chat = opened(Text(files=(str(write(tmp_path / "b.jsonl", [{"messages": CHAT}])),))).documents
    mask = chat.counted(0)
    assert mask is not None and tokenizer.decode(chat.ids(0)[mask]) == "assistant:1\n"
    assert not opened(Text(files=(str(tmp_path / "b.jsonl"),), train_on="all")).documents.has_labels


def test_documents_without_labels_are_counted_and_refused_if_there_are_no_others(opened: Any, tmp_path: Path) -> None:
    empty, full = {"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [5, 6], "labels": [5, 6]}
    found = opened(Text(files=(str(write(tmp_path / "a.jsonl", [empty, full])),)))
    assert "1 of 2 documents have no token that is to be predicted" in found.printed
    with pytest.raises(DataError, match=r"no token of '.*b\.jsonl' is to be predicted\n  found:   2 documents"):
        opened(Text(files=(str(write(tmp_path / "b.jsonl", [empty, empty])),)))


@pytest.mark.parametrize("name", ["ids", "lengths", "hashes", "meta.json", "counted"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_store_is_written_again(opened: Any, tmp_path: Path, name: str, damage: str) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    text = Text(files=(str(write(tmp_path / "a.jsonl", rows)),))
    whole = opened(text).documents
    (path,) = (tmp_path / "cache" / "tokens").glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    again = opened(text)
    assert again.is_new and "is damaged" in again.printed
    assert again.documents.fingerprint == whole.fingerprint and again.documents.ids(0).tolist() == [5, 6, 7]
    assert not opened(text).is_new


def test_a_full_disk_leaves_nothing_and_names_what_to_free(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(files=(str(write(tmp_path / "a.jsonl", [{"text": "one"}])),))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("xarch_kd.data.store.StoreWriter._end", full)
        with pytest.raises(DataError, match=r"cannot write the token store[\s\S]*no space left[\s\S]*XARCH_KD_CACHE"):
            opened(text)
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if not path.name.endswith(".lock")] == []
    assert opened(text).texts == ["one<|end|>"]


def test_a_cache_that_cannot_be_written_is_named_and_one_that_holds_the_text_is_read(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(files=(str(write(tmp_path / "a.jsonl", [{"text": "one"}])),))
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot write the token store[\s\S]*XARCH_KD_CACHE to a folder that can"):
        opened(text)
    (tmp_path / "cache").unlink()
    opened(text)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("xarch_kd.files.os.replace", refuse)
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -60.0)
    assert opened(text).texts == ["one<|end|>"]


def test_documents_that_nothing_separates_are_reported(opened: Any, tmp_path: Path) -> None:
    made = tiny_tokenizer()
    made.bos_token = made.eos_token = None
    text = Text(files=(str(write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])),))
    found = opened(text, made)
    assert found.texts == ["one", "two"] and "nothing separates the documents of a row" in found.printed


def test_a_file_that_changes_while_it_is_read_is_refused(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "one"}])
    plain = sources.read_records

    def read(*arguments: Any) -> Any:
        yield from plain(*arguments)
        write(path, [{"text": "more"}])

    monkeypatch.setattr(sources, "read_records", read)
    with pytest.raises(DataError, match="changed while it was read"):
        opened(Text(files=(str(path),)))


def test_sources_of_all_kinds_in_one_order(opened: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("plain", encoding="utf-8")
    write(folder / "b.JSONL", [{"text": "line"}])
    (folder / "c.csv").write_text("text\ncell\n", encoding="utf-8")
    assert opened(Text(files=(str(folder),))).texts == ["plain<|end|>", "line<|end|>", "cell<|end|>"]
    documents = opened(Text(builtin="licences")).documents
    assert len(documents) > 3 and documents.tokens > 50_000


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("blank.txt",), r"the text source '.*blank\.txt' is empty"),
        (("text.jsonl", "chat.jsonl"), r"chat\.jsonl:1: a document of another shape[\s\S]*text, as in .*text\.jsonl:1"),
        (("text.jsonl", "body.jsonl"), r"body\.jsonl:1: no text under 'text'[\s\S]*columns: body"),
        (("sharegpt.jsonl",), r'sharegpt\.jsonl:1[\s\S]*write conversations as messages: \[\{"role"'),
    ],
)
def test_files_that_do_not_fit_are_refused(opened: Any, tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    write(tmp_path / "text.jsonl", [{"text": "a"}])
    write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    write(tmp_path / "body.jsonl", [{"body": "a"}])
    write(tmp_path / "sharegpt.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}])
    with pytest.raises(DataError, match=message):
        opened(Text(files=tuple(str(tmp_path / name) for name in names)))


def test_saved_datasets_have_their_splits(opened: Any, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": list("abcde"), "other": list(range(5))})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "parts")

    def texts(name: str, split: str | None = None) -> str:
        found = opened(Text(dataset=str(tmp_path / name), split=split)).texts
        return "".join(text.removesuffix("<|end|>") for text in found)

    assert [texts("one"), texts("one", "train[:3]"), texts("one", "train[-40%:]")] == ["abcde", "abc", "de"]
    assert [texts("parts"), texts("parts", "test"), texts("parts", "test+train[:2]")] == ["abcde", "b", "bab"]
    for name, split in (("one", "test"), ("parts", "valid"), ("parts", "train[:")):
        with pytest.raises(DataError, match=r"no such split[\s\S]*allowed: train \(5 rows\)"):
            texts(name, split)


def test_a_folder_of_data_files_is_a_dataset(opened: Any, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, text in (("train-0", "a"), ("train-1", "b"), ("test-0", "c")):
        datasets.Dataset.from_dict({"messages": [[{"role": "assistant", "content": text}]]}).to_parquet(
            folder / f"{name}.parquet"
        )
    text = Text(dataset=str(folder), split="train", train_on="all")
    assert opened(text).texts == ["assistant:a\n", "assistant:b\n"]
    assert not opened(text).is_new
    assert opened(Text(dataset=str(folder), split="test", train_on="all")).texts == ["assistant:c\n"]
    with pytest.raises(DataError, match=r"cannot load the dataset[\s\S]*split valid"):
        opened(Text(dataset=str(folder), split="valid"))


def test_datasets_that_are_none_are_refused(opened: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError, match=r"is a file[\s\S]*files: \["):
        opened(Text(dataset=str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match="there is no folder"):
        opened(Text(dataset=str(tmp_path / "absent")))


def test_tokens_are_the_same_whatever_the_number_of_processes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xarch_kd.data.tokenization.BATCH_DOCUMENTS", 4)
    monkeypatch.setattr("xarch_kd.data.long_text.LONGEST_CALL", 50)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    rows = [{"messages": [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": "x" * n}]}
            for n in range(1, 40)]  # fmt: skip
    path = str(write(tmp_path / "a.jsonl", rows))
    found = []
    for processes in (1, 2, 3):
        reporter, seen = Reporter(Console(file=io.StringIO())), tmp_path / f"cache-{processes}"
        found.append(open_documents(Text(files=(path,)), tokenizer, reporter=reporter, cache=seen, processes=processes))
    assert len({documents.fingerprint for documents in found}) == 1 and len(found[0]) == len(rows)
    assert found[1].hashes.tolist() == found[0].hashes.tolist()
    text, mask = found[2].ids(38), found[2].counted(38)
    assert mask is not None and tokenizer.decode(text[mask]) == f"assistant:{'x' * 39}\n"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_workers_are_other_processes_and_one_that_is_killed_is_reported(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xarch_kd.data.tokenization.BATCH_DOCUMENTS", 1)
    here, calls = os.getpid(), tmp_path / "calls"
    prepare = DocumentTokenizer.prepare

    def noted(self: DocumentTokenizer, batch: Any) -> Any:
        with calls.open("a") as file:
            file.write(f"{os.getpid()} {os.environ.get('TOKENIZERS_PARALLELISM')}\n")
        if os.getpid() != here and batch[0].text == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if batch[0].text == "wrong":
            raise DataError("row 9: wrong", found="this", fix="that")
        return prepare(self, batch)

    monkeypatch.setattr(DocumentTokenizer, "prepare", noted)

    def open_rows(last: str) -> TokenizedDocuments:
        path = write(tmp_path / f"{last}.jsonl", [*({"text": f"row {n}"} for n in range(8)), {"text": last}])
        reporter = Reporter(Console(file=io.StringIO()))
        return open_documents(Text(files=(str(path),)), tokenizer, reporter=reporter, cache=tmp_path, processes=2)

    assert len(open_rows("fine")) == 9
    seen = [line.split() for line in calls.read_text().splitlines()]
    assert [pid == str(here) for pid, _ in seen] == [True] * 4 + [False] * 5
    assert {value for pid, value in seen if pid != str(here)} == {"false"}
    with pytest.raises(DataError, match=r"ended before its batch was done[\s\S]*processes: 1"):
        open_rows("kill")
    with pytest.raises(DataError, match="row 9: wrong\n  found:   this\n  fix:     that"):
        open_rows("wrong")
