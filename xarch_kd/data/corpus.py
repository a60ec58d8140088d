"""Corpora that every installation has: documentation, sources and docstrings, licence texts, generated lists."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from xarch_kd.data.copying import copy_documents
from xarch_kd.mapping_file.text import Generated, Text

# Core dependencies whose licence texts are used as out-of-domain prose.
LICENSED = ("torch", "numpy", "scipy", "transformers", "safetensors", "pydantic", "einops", "Jinja2", "rich", "typer")

# Folders of numpy whose docstrings are used as out-of-domain documentation.
MEASURED_DOCS = {"numpy": ("fft", "lib", "linalg", "polynomial")}
# Folders of other dependencies whose docstrings are varied prose to train on.
TRAINED_DOCS = {
    "torch": (".", "autograd", "distributions", "func", "nn", "nn/modules", "nn/utils", "optim", "utils/data"),
    "transformers": (".", "data", "generation", "utils"),
}
SHORTEST_DOCSTRING = 400

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


def library_docs() -> Corpus:
    """Return the longer docstrings of numpy as installed here, in the order of their hashes: mixed, but fixed."""
    return _documentation("library-docs", "docstrings of a library (numpy)", MEASURED_DOCS)


def framework_docs() -> Corpus:
    """Return the longer docstrings of torch and transformers as installed here, in the order of their hashes."""
    return _documentation("framework-docs", "docstrings of torch and transformers", TRAINED_DOCS)


def _documentation(name: str, description: str, folders: Mapping[str, Sequence[str]]) -> Corpus:
    texts: dict[str, str] = {}
    for package, parts in folders.items():
        spec = importlib.util.find_spec(package)
        root = Path(next(iter((spec and spec.submodule_search_locations) or ())))
        for file in sorted(file for part in parts for file in (root / part).glob("*.py")):
            texts.update((hashlib.sha256(text.encode()).hexdigest(), text) for text in _docstrings(file))
    return Corpus(
        name=name, description=description, documents=_without_repetition([texts[key] for key in sorted(texts)])
    )


def _docstrings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST_DOCSTRING:
                yield text


def copy(generated: Generated | None = None) -> Corpus:
    """Return generated lists of identifiers that are repeated, and values asked for by their keys."""
    options = generated or Generated()
    return Corpus(
        name="copy",
        description=f"{options.documents:,} generated documents to copy from (seed {options.seed})",
        documents=copy_documents(options.documents, options.seed),
    )


def builtin_corpus(text: Text) -> Corpus:
    """Return the corpus that `builtin` names."""
    return copy(text.generated) if text.builtin == "copy" else BUILTIN[str(text.builtin)]()


BUILTIN: dict[str, Callable[[], Corpus]] = {
    "python-docs": python_docs,
    "python-sources": python_sources,
    "licences": licences,
    "library-docs": library_docs,
    "framework-docs": framework_docs,
    "copy": copy,
}
