"""Corpora: named lists of documents from the standard library, from files, or from Hugging Face `datasets`."""

from __future__ import annotations

import glob
import hashlib
import importlib
import importlib.metadata
import json
import sysconfig
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from xarch_kd.errors import DataError, UsageError

# Core dependencies whose licence texts are used as out-of-domain prose.
LICENSED = ("torch", "numpy", "scipy", "transformers", "safetensors", "pydantic", "einops", "Jinja2", "rich", "typer")


# Shorter paragraphs (headings, signatures) may recur in the held-out part.
SHORTEST_PARAGRAPH = 40


def _paragraphs(document: str) -> list[str]:
    return [part for part in document.split("\n\n") if len(part.strip()) >= SHORTEST_PARAGRAPH]


def _without(document: str, seen: Set[str]) -> str:
    return "\n\n".join(
        part for part in document.split("\n\n") if len(part.strip()) < SHORTEST_PARAGRAPH or part not in seen
    )


def _without_repetition(documents: Sequence[str]) -> tuple[str, ...]:
    """Return documents of which each paragraph is kept only in the longest that has it, and none that are left empty.

    So no split of the documents measures text that was trained on.
    """
    seen: set[str] = set()
    kept = list(documents)
    for index in sorted(range(len(documents)), key=lambda index: -len(documents[index])):
        kept[index] = _without(documents[index], seen)
        seen.update(_paragraphs(documents[index]))
    return tuple(document for document in kept if document.strip())


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Named list of documents. `description` is one line for tables; `sha256` covers all documents in order."""

    name: str
    description: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the documents, each closed by a zero byte."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode())
            digest.update(b"\0")
        return digest.hexdigest()


def python_docs() -> Corpus:
    """Return the reference topics of the Python documentation that the standard library carries.

    Many topics are sections of longer ones: each paragraph is kept only in the longest topic that has it.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return Corpus(
        name="python-docs",
        description="the Python reference's topics (pydoc_data.topics)",
        documents=_without_repetition([topics[key] for key in sorted(topics)]),
    )


def python_sources() -> Corpus:
    """Return the source files of the standard library's top level, in alphabetical order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    texts = tuple(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return Corpus(
        name="python-sources",
        description="source files of the Python standard library",
        documents=_without_repetition(texts),
    )


def licences() -> Corpus:
    """Return the distinct licence texts of the core dependencies as installed here."""
    texts: dict[str, str] = {}
    for name in LICENSED:
        for file in sorted(importlib.metadata.files(name) or (), key=str):
            if "dist-info" in file.parts[0] and any(word in file.name.upper() for word in ("LICENSE", "LICENCE")):
                text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
                texts.setdefault(hashlib.sha256(text.encode()).hexdigest(), text)
    return Corpus(
        name="licences",
        description="legal prose: licence texts of the installed dependencies",
        documents=_without_repetition(list(texts.values())),
    )


BUILTIN: dict[str, Callable[[], Corpus]] = {
    "python-docs": python_docs,
    "python-sources": python_sources,
    "licences": licences,
}


def read_corpus(
    *,
    builtin: str | None = None,
    files: Sequence[str] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    column: str = "text",
) -> Corpus:
    """Return the corpus that exactly one of `builtin`, `files` and `dataset` names.

    `files` are paths or glob patterns: `.jsonl` gives one document per line (its `column`), any
    other file one document. Raises `DataError` for missing, unreadable or empty files.
    """
    if builtin is not None:
        corpus = BUILTIN[builtin]()
    elif files is not None:
        corpus = _from_files(files, column)
    elif dataset is not None:
        corpus = _from_dataset(dataset, dataset_config, split or "train", column)
    else:
        raise UsageError("no text source", allowed="exactly one of builtin | files | dataset")
    documents = tuple(document for document in corpus.documents if document.strip())
    if not documents:
        raise DataError(
            f"the text source '{corpus.name}' is empty",
            found=f"{len(corpus.documents)} documents, none with text in it",
            fix="give files that hold text, or another source",
        )
    return Corpus(name=corpus.name, description=corpus.description, documents=documents)


def _from_files(patterns: Sequence[str], column: str) -> Corpus:
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not found:
            raise DataError(
                "a file pattern matches nothing",
                asked=pattern,
                found=f"no file under {Path.cwd()}",
                fix="give a path or a glob pattern from the working directory, e.g. files: ['texts/*.txt']",
            )
        paths.extend(Path(name) for name in found if Path(name).is_file())
    documents: list[str] = []
    for path in paths:
        documents.extend(_read_file(path, column))
    name = ", ".join(patterns)
    return Corpus(name=name, description=f"{len(paths)} files ({name})", documents=tuple(documents))


def _read_file(path: Path, column: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text", found=str(error)) from error
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            documents.append(_jsonl_text(line, column, f"{path}:{number}"))
    return documents


def _jsonl_text(line: str, column: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a line of JSON", found=str(error)) from error
    if not isinstance(value, dict) or not isinstance(value.get(column), str):
        keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where}: no text under '{column}'",
            found=f"keys: {keys}",
            fix="name the column in the mapping file: column: …",
        )
    return value[column]


def _from_dataset(name: str, config: str | None, split: str, column: str) -> Corpus:
    datasets = importlib.import_module("datasets")
    local = Path(name)
    if local.is_dir():
        table = datasets.load_from_disk(name)
        table = table[split] if hasattr(table, "keys") else table
    else:
        table = datasets.load_dataset(name, config, split=split)
    if column not in table.column_names:
        raise DataError(f"dataset '{name}' has no column '{column}'", allowed=", ".join(table.column_names))
    return Corpus(name=name, description=f"dataset {name}, split {split}", documents=tuple(table[column]))
