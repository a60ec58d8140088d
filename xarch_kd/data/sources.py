"""Text sources of a mapping file as tokenized documents, tokenized once and then opened from the token store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from xarch_kd.data.corpus import builtin_corpus
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.hub import NamedDataset
from xarch_kd.data.identity import file_states, files_identity, sha256_json, tokenizer_identity
from xarch_kd.data.paths import FoundFiles, find_files
from xarch_kd.data.reading import read_records
from xarch_kd.data.records import Record
from xarch_kd.data.shapes import Shapes, wanted_columns
from xarch_kd.data.store import DamagedStore, StoreWriter, cache_folder, locked, open_store, write_store
from xarch_kd.data.tokenization import DocumentTokenizer
from xarch_kd.data.workers import default_processes, tokenized
from xarch_kd.errors import DataError
from xarch_kd.mapping_file.schema import Text
from xarch_kd.run.report import Reporter


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A text source: `identity` returns a value for its content, and `files` are those that it is read from."""

    name: str
    description: str
    records: Callable[[], Iterable[Record]]
    identity: Callable[[Callable[[int], None]], Any]
    files: Callable[[], list[Path]]
    notices: tuple[str, ...] = ()


def open_documents(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reporter: Reporter,
    cache: Path | None = None,
    processes: int | None = None,
) -> TokenizedDocuments:
    """Return the documents of a text source as token ids, from the token store where they are in it.

    `cache` is the folder of the token store, by default `cache_folder()`. `processes` tokenize a text of more than four
    million characters, by default one per processor that this process may use; the tokens are the same. A store that
    is damaged is written again, with a notice. Notices about documents that were left out are printed through
    `reporter` at every start.

    Raises:
        DataError: the source cannot be read or has no text, a document does not fit, no token is to be predicted, a
            file changes while it is read, or the store cannot be written.
        UsageError: keys of the source do not fit together.
    """
    cache = cache or cache_folder()
    source = _source(text, cache)
    with reporter.work(f"reading {source.name}", None, "bytes") as work:
        content = source.identity(work.advance)
    settings = text.model_dump(include={"shape", "column", "train_on", "bos", "eos"})
    key = sha256_json([content, settings, tokenizer_identity(tokenizer)])[:40]
    folder = cache / "tokens" / key
    with locked(folder):
        try:
            documents, notices = open_store(folder, name=source.name, description=source.description)
        except DamagedStore as damage:
            if folder.exists():
                reporter.line(f"the token store {folder} is damaged ({damage}): the text is tokenized again")
            write_store(folder, lambda new: _write(new, source, text, tokenizer, reporter, processes))
            documents, notices = open_store(folder, name=source.name, description=source.description)
    for notice in (*source.notices, *notices):
        reporter.line(f"{source.name}: {notice}")
    return documents


def _source(text: Text, cache: Path) -> _Source:
    if text.builtin is not None:
        corpus = builtin_corpus(text)
        return _Source(
            name=corpus.name,
            description=corpus.description,
            records=lambda: (
                Record(f"{corpus.name}: document {number}", {"text": document})
                for number, document in enumerate(corpus.documents, 1)
            ),
            identity=lambda progress: corpus.sha256,
            files=list,
        )
    if text.files is not None:
        found = find_files(text.files)
        name = ", ".join(text.files)
        paths = [file.path for file in found.files]
        formats = [[file.format, file.compression] for file in found.files]
        return _Source(
            name=name,
            description=f"{len(paths)} files ({name})",
            records=lambda: _file_records(found, text),
            identity=lambda progress: [formats, files_identity(paths, cache, progress)],
            files=lambda: paths,
            notices=found.notices,
        )
    dataset = NamedDataset(text)

    def identity(progress: Callable[[int], None]) -> Any:
        commit = dataset.commit()
        if commit is not None:
            return [dataset.name, commit, *dataset.identity()]
        return [dataset.is_saved, files_identity(dataset.files(), cache, progress), *dataset.identity()]

    return _Source(
        name=dataset.name,
        description=dataset.description,
        records=dataset.records,
        identity=identity,
        files=lambda: dataset.files() if dataset.is_local else [],
    )


def _file_records(found: FoundFiles, text: Text) -> Iterator[Record]:
    for file in found.files:
        yield from read_records(file, wanted_columns(text))


def _write(
    folder: Path,
    source: _Source,
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    processes: int | None,
) -> None:
    """Tokenize the source into a new store. Raises DataError as `open_documents` does."""
    before = file_states(source.files())
    documents = DocumentTokenizer(tokenizer, text)
    writer = StoreWriter(folder, limit=len(tokenizer))
    with reporter.work(f"tokenizing {source.name}", None, "tokens") as work:
        batches = documents.batches(Shapes(text).documents(source.records()))
        for tokens in writer.write(tokenized(documents, batches, processes or default_processes())):
            work.at(tokens)
    if file_states(source.files()) != before:
        raise DataError(f"a file of '{source.name}' changed while it was read", fix="start again when it is complete")
    notices = []
    if not documents.separates and writer.documents > 1:
        notices.append(
            "the tokenizer has no eos token and adds no bos token, so nothing separates the documents of a row"
        )
    if documents.blank:
        notices.append(f"{documents.blank:,} texts without a character beside blanks are left out")
    if writer.unlabelled:
        notices.append(f"{writer.unlabelled:,} of {writer.documents:,} documents have no token that is to be predicted")
    if writer.documents == 0:
        raise DataError(
            f"the text source '{source.name}' is empty",
            found=f"{documents.blank} documents, none with text in it",
            fix="give files that hold text, or another source",
        )
    if writer.unlabelled == writer.documents:
        raise DataError(
            f"no token of '{source.name}' is to be predicted",
            found=f"{writer.documents:,} documents without labels, train_on: {text.train_on}",
            fix="train_on: all, or data with labels other than -100",
        )
    writer.finish(notices)
