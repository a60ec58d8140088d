"""Records of a text source that are read piece by piece, and places from which they are read again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from xarch_kd.data.corpus import builtin_corpus
from xarch_kd.data.hub import NamedDataset
from xarch_kd.data.paths import find_files
from xarch_kd.data.reading import read_records
from xarch_kd.data.records import Record
from xarch_kd.data.shapes import wanted_columns
from xarch_kd.data.tables import without_missing
from xarch_kd.errors import DataError
from xarch_kd.mapping_file.text import Text

# Returns the place after a record, as JSON values.
Place = Callable[[], Any]


class RecordStream(Protocol):
    """Records of a text source in a fixed order."""

    @property
    def name(self) -> str:
        """Short name for messages."""
        ...

    @property
    def content(self) -> Any:
        """JSON values that change with what is read, as far as that is known without reading it."""
        ...

    def records(self, place: Any) -> Iterator[tuple[Record, Place]]:
        """Yield the records of one pass from a place on (None: the start), each with the place after it.

        A place is to be asked for before the next record is read. Raises DataError for a source that cannot be read.
        """
        ...


def record_stream(text: Text) -> RecordStream:
    """Return the records of a text source. Raises DataError for files that do not exist."""
    if text.files is not None:
        return FileStream(text)
    if text.builtin is not None:
        return CorpusStream(text)
    dataset = NamedDataset(text)
    if dataset.is_saved:
        return SavedStream(text, dataset)
    return DatasetStream(text)


class FileStream:
    """Records of data files, one file after another. A file is read again up to the place at which it continues."""

    def __init__(self, text: Text) -> None:
        assert text.files is not None
        self._text, self._files, self.name = text, find_files(text.files).files, ", ".join(text.files)

    @property
    def content(self) -> Any:
        """Names and sizes of the files."""
        return [[file.path.name, file.path.stat().st_size] for file in self._files]

    def records(self, place: Any) -> Iterator[tuple[Record, Place]]:
        """Yield the records of the files; a place is the number of a file, and of its records before it."""
        first, before = place or (0, 0)
        for number, file in enumerate(self._files[first:], first):
            skipped = before if number == first else 0
            records = islice(read_records(file, wanted_columns(self._text)), skipped, None)
            for index, record in enumerate(records, skipped + 1):
                yield record, lambda number=number, index=index: [number, index]


class CorpusStream:
    """Documents of a builtin corpus, which are in memory."""

    def __init__(self, text: Text) -> None:
        self._corpus = builtin_corpus(text)
        self.name = self._corpus.name

    @property
    def content(self) -> Any:
        """SHA-256 of the documents."""
        return self._corpus.sha256

    def records(self, place: Any) -> Iterator[tuple[Record, Place]]:
        """Yield the documents; a place is the number of those before it."""
        for number, document in enumerate(self._corpus.documents[place or 0 :], (place or 0) + 1):
            yield Record(f"{self.name}: document {number}", {"text": document}), lambda number=number: number


class SavedStream:
    """Rows of a folder of `save_to_disk`, which are mapped into memory."""

    def __init__(self, text: Text, dataset: NamedDataset) -> None:
        self._dataset, self.name = dataset, dataset.name

    @property
    def content(self) -> Any:
        """Number of rows and the fingerprint of the library `datasets`."""
        dataset = self._dataset.load()
        return [len(dataset), dataset._fingerprint]

    def records(self, place: Any) -> Iterator[tuple[Record, Place]]:
        """Yield the rows; a place is the number of those before it."""
        for number, record in enumerate(self._dataset.records(place or 0), (place or 0) + 1):
            yield record, lambda number=number: number


class DatasetStream:
    """Rows of a dataset of the hub or of a folder of data files, which the library `datasets` streams."""

    def __init__(self, text: Text) -> None:
        assert text.dataset is not None
        self._text, self.name = text, text.dataset

    @property
    def content(self) -> Any:
        """Nothing is known of the rows without reading them."""
        return None

    def records(self, place: Any) -> Iterator[tuple[Record, Place]]:
        """Yield the rows; a place is a state of the library."""
        dataset = self._load()
        if place is not None:
            dataset.load_state_dict(place)
        for row in dataset:
            yield Record(self.name, {key: without_missing(value) for key, value in row.items()}), dataset.state_dict

    def _load(self) -> Any:
        datasets = importlib.import_module("datasets")
        folder = Path(self.name).expanduser()
        try:
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else self.name,
                self._text.dataset_config,
                split=self._text.split or "train",
                revision=self._text.revision,
                streaming=True,
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot stream the dataset '{self.name}'",
                found=f"{type(error).__name__}: {error}"[:400],
                fix="check its name, dataset_config, split (a name alone, without a range, as the number of rows is "
                "not known) and revision",
            ) from error
