"""Progress of reading weights, from the progress bars that transformers would draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import transformers.modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging

# Called with the number of tensors that were read and their total number.
Progress = Callable[[int, int | None], None]


@contextmanager
def weights_progress(progress: Progress) -> Iterator[None]:
    """Call `progress` while weights are read in the block, instead of drawing transformers' own bars."""

    def counted(_factory: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> _Counter:
        return _Counter(progress, *arguments, **options)

    previous = logging.set_tqdm_hook(counted)
    # The GGUF reader takes tqdm's own bar, which no hook reaches.
    bar = vars(gguf)["tqdm"]
    setattr(gguf, "tqdm", partial(_Counter, progress))  # noqa: B010  # not one of its public names
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
        setattr(gguf, "tqdm", bar)  # noqa: B010


class _Counter:
    """Iterable or manually updated counter with the part of tqdm's interface that transformers uses."""

    def __init__(
        self, progress: Progress, iterable: Iterable[Any] = (), *_: object, total: int | None = None, **__: object
    ) -> None:
        self._progress, self._iterable = progress, iterable
        self._total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)  # type: ignore[arg-type]
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, count: int = 1) -> None:
        """Count items."""
        self._done += count
        self._progress(self._done, self._total)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a method that does nothing, for what changes a bar's looks."""
        return lambda *_, **__: None
