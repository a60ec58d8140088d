"""Datasets of the library `datasets`: of the hub, of `save_to_disk`, or a folder of data files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from xarch_kd.data.records import Record
from xarch_kd.data.shapes import wanted_columns
from xarch_kd.data.tables import ROWS, table_rows
from xarch_kd.errors import DataError, UsageError
from xarch_kd.mapping_file.schema import Text

SAVED: Final = ("dataset_dict.json", "state.json")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class NamedDataset:
    """The dataset that `dataset`, `dataset_config`, `split` and `revision` of a text source name.

    The library `datasets` is imported when the dataset is loaded. Raises UsageError for a file, or for keys that only a
    dataset of the hub has.
    """

    def __init__(self, text: Text) -> None:
        assert text.dataset is not None
        self.name, self._text = text.dataset, text
        self._folder = Path(text.dataset).expanduser()
        self._loaded: Any = None
        if self._folder.is_file():
            raise UsageError(
                f"dataset: {self.name} is a file", fix=f"name data files under files: files: ['{self.name}']"
            )
        if not self.is_local and self.name.startswith((".", "/", "~")):
            raise DataError(f"dataset: there is no folder {self.name}", found=f"working directory {Path.cwd()}")
        if self.is_local and text.revision is not None:
            raise UsageError("revision is for a dataset of the hub", found=f"the folder {self.name}")
        if self.is_saved and text.dataset_config is not None:
            raise UsageError(
                "dataset_config is not for a folder of save_to_disk", asked=text.dataset_config, found=self.name
            )

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine."""
        return self._folder.is_dir()

    @property
    def is_saved(self) -> bool:
        """True for a folder that `save_to_disk` wrote."""
        return self.is_local and any((self._folder / name).is_file() for name in SAVED)

    @property
    def description(self) -> str:
        """Name, config, split and revision in one line."""
        text = self._text
        parts = [f"dataset {self.name}", f"config {text.dataset_config}", f"split {text.split or 'train'}"]
        if self.is_saved and text.split is None:
            parts.pop()
        if text.revision is not None:
            parts.append(f"revision {text.revision}")
        return ", ".join(part for part in parts if not part.endswith(" None"))

    def files(self) -> list[Path]:
        """Return the files that hold the dataset here; those of a dataset of the hub only once it is loaded."""
        if self.is_local:
            return sorted(path for path in self._folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return [Path(entry["filename"]) for entry in self.load().cache_files]

    def identity(self) -> list[Any]:
        """Return what else identifies the dataset, beside its files."""
        return [self._text.dataset_config, self._text.split]

    def commit(self) -> str | None:
        """Return the commit that the revision of a dataset of the hub names, if it is one."""
        revision = self._text.revision or ""
        return revision if not self.is_local and COMMIT.fullmatch(revision) else None

    def records(self, first: int = 0) -> Iterator[Record]:
        """Yield the rows in order, from row `first` on (the first is 0).

        Raises DataError for a dataset, config, split or revision that cannot be loaded.
        """
        dataset = self.load()
        names = tuple(dataset.column_names)
        table = dataset.select_columns([name for name in names if name in wanted_columns(self._text)])
        table = table.with_format("arrow")
        batches = (
            batch
            for start in range(first, len(table), ROWS)
            for batch in table[start : min(start + ROWS, len(table))].to_batches()
        )
        yield from table_rows(self.name, batches, names, first=first)

    def load(self) -> Any:
        """Return the dataset, loaded once."""
        if self._loaded is None:
            datasets = importlib.import_module("datasets")
            try:
                self._loaded = self._saved(datasets) if self.is_saved else self._built(datasets)
            except DataError:
                raise
            except Exception as error:
                cause = error.__cause__ or error
                raise DataError(
                    f"cannot load the dataset '{self.name}'",
                    asked=self.description,
                    found=f"{type(cause).__name__}: {cause}"[:400],
                    fix="check its name, dataset_config, split and revision; without network, name a folder of it",
                ) from error
        return self._loaded

    def _built(self, datasets: Any) -> Any:
        text = self._text
        return datasets.load_dataset(
            str(self._folder) if self.is_local else self.name,
            text.dataset_config,
            split=text.split or "train",
            revision=text.revision,
        )

    def _saved(self, datasets: Any) -> Any:
        """Return the rows of a folder of `save_to_disk` that `split` names, e.g. `train[:3]`."""
        found = datasets.load_from_disk(str(self._folder))
        if isinstance(found, datasets.Dataset):
            if self._text.split is None:
                return found
            parts = {str(found.split) if found.split is not None else "train": found}
        else:
            parts = dict(found)
        split = self._text.split or "train"
        try:
            instruction = datasets.ReadInstruction.from_spec(split)
            chosen = instruction.to_absolute({name: len(part) for name, part in parts.items()})
        except (ValueError, KeyError, AssertionError) as error:
            raise DataError(
                f"the dataset '{self.name}' has no such split",
                asked=f"split: {split}",
                found=str(error).splitlines()[0][:200],
                allowed=", ".join(f"{name} ({len(part):,} rows)" for name, part in parts.items()),
            ) from error
        return datasets.concatenate_datasets(
            [parts[entry.splitname].select(range(entry.from_, entry.to)) for entry in chosen]
        )
