"""Corpora: named lists of documents from the standard library, from files, or from Hugging Face `datasets`."""

from __future__ import annotations

import glob
import hashlib
import importlib
import importlib.metadata
import json
import random
import sysconfig
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
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

    def split(self, held_out: float, *, seed: int) -> tuple[Corpus, Corpus]:
        """Return (training, held-out) corpora that share no document.

        Documents are shuffled by `seed` and moved to the held-out side until it has at least `held_out` of all
        characters. A corpus of one document is split at the nearest line break instead. Paragraphs that occur in the
        training side too are then removed from the held-out side, so that memorized text is not measured. Raises
        `DataError` if nothing remains.
        """
        training, held = self._cut(held_out) if len(self.documents) == 1 else self._shuffled(held_out, seed)
        seen = {paragraph for document in training.documents for paragraph in _paragraphs(document)}
        own = tuple(
            document for document in (_without(document, seen) for document in held.documents) if document.strip()
        )
        if not own:
            raise DataError(
                f"every paragraph of the held-out part of '{self.name}' occurs in its training part too",
                fix="give less repetitive text, or another data.held_out or seed",
            )
        return training, replace(held, documents=own)

    def _shuffled(self, held_out: float, seed: int) -> tuple[Corpus, Corpus]:
        order = list(range(len(self.documents)))
        random.Random(seed).shuffle(order)
        wanted, taken, held = held_out * sum(map(len, self.documents)), 0, []
        while order and (taken < wanted or not held) and len(order) > 1:
            held.append(order.pop())
            taken += len(self.documents[held[-1]])
        return self._part("training", sorted(order)), self._part("held-out", sorted(held))

    def _cut(self, held_out: float) -> tuple[Corpus, Corpus]:
        text = self.documents[0]
        at = text.find("\n", int(len(text) * (1 - held_out))) + 1 or int(len(text) * (1 - held_out))
        whole = Corpus(name=self.name, description=self.description, documents=(text[:at], text[at:]))
        return whole._part("training", [0]), whole._part("held-out", [1])

    def _part(self, which: str, indices: Sequence[int]) -> Corpus:
        documents = tuple(self.documents[index] for index in indices)
        return Corpus(
            name=f"{self.name} ({which})", description=f"{which} part of {self.description}", documents=documents
        )


def python_docs() -> Corpus:
    """Return the reference topics of the Python documentation that the standard library carries.

    Many topics are sections of longer ones: each paragraph is kept only in the longest topic that has it.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for key in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        kept[key] = _without(topics[key], seen)
        seen.update(_paragraphs(topics[key]))
    return Corpus(
        name="python-docs",
        description="the Python reference's topics (pydoc_data.topics)",
        documents=tuple(kept[key] for key in sorted(kept) if kept[key].strip()),
    )


def python_sources() -> Corpus:
    """Return the source files of the standard library's top level, in alphabetical order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    texts = tuple(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return Corpus(name="python-sources", description="source files of the Python standard library", documents=texts)


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
        documents=tuple(texts.values()),
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
