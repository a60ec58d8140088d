"""Micro-batches of a source as `transformers.Trainer` iterates over them."""

from __future__ import annotations

from collections.abc import Iterator

from xarch_kd.data.batches import Batch, BatchSource


class MicroBatchStream:
    """Micro-batches of a source as the Trainer iterates over them; its length is that of the whole stage.

    Nothing is drawn ahead, which a source that samples from the student could not do, and a resumed iteration begins
    where the source's state was restored to.
    """

    def __init__(self, source: BatchSource, micro_batches: int) -> None:
        self.source = source
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.source.draw()
