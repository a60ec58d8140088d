"""Texts of a mapping file as rows of tokens: the training text, its held-out part, and texts of other kinds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch, BatchSource
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.mixture import MixedRows
from xarch_kd.data.packing import PackedRows, pack
from xarch_kd.data.rows import BatchOrder, Rows, StageRows, first_rows, rows_of_tokens
from xarch_kd.data.sources import open_documents
from xarch_kd.data.splitting import split_documents
from xarch_kd.data.streamed_rows import StreamedRows
from xarch_kd.data.streaming import DocumentStream, first_documents
from xarch_kd.errors import DataError
from xarch_kd.mapping_file.schema import Data, Evaluate, Text
from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.run.report import Reporter

HELD_OUT = "held-out"
# Rows that comparing layers needs at least, some of them too short for it.
CALIBRATION_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class RunText:
    """Text of a run: the rows it trains on, and the documents held out of each source or named for evaluation.

    With `streams`, one per source, `training` has the first rows of each, which calibration reads. `trained_on` counts
    the documents named for evaluation that are in the training text too.
    """

    training: Rows
    held_out_documents: tuple[TokenizedDocuments, ...]
    data: Data
    streams: tuple[DocumentStream, ...] = ()
    trained_on: int = 0

    def source(self, order: BatchOrder) -> BatchSource:
        """Return the batches of a stage, in `order`, or of streams, drawn in the shares of `order`."""
        if not self.streams:
            return StageRows(self.training, order)
        return StreamedRows(
            self.streams,
            order,
            sequence_length=self.data.sequence_length,
            packing=self.data.packing,
            held_out=self.data.held_out_share,
            isolated=self.data.documents == "isolated",
        )

    @property
    def held_out_fingerprint(self) -> str:
        """SHA-256 of the held-out documents in order; of streams, whose end is not known, of the first ones alone."""
        if self.streams and self.data.evaluation is None:
            first = b"".join(part.hashes[:1].tobytes() for part in self.held_out_documents)
            return hashlib.sha256(first).hexdigest()
        parts = "\n".join(part.fingerprint for part in self.held_out_documents)
        return hashlib.sha256(parts.encode()).hexdigest()

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines to print: the rows of each source, what packing left out, and how much text is held out."""
        parts = self.training.parts if isinstance(self.training, MixedRows) else (self.training,)
        held_out = tuple(
            f"held out: {documents.tokens:,} tokens in {len(documents):,} documents, {documents.description}"
            for documents in self.held_out_documents
        )
        return (*(_size(part) for part in parts), *self.training.notices, *held_out, *self._overlap())

    def _overlap(self) -> Iterator[str]:
        if self.trained_on:
            documents = sum(len(part) for part in self.held_out_documents)
            yield (
                f"warning: {self.trained_on:,} of {documents:,} documents of data.evaluation are in the training text "
                "too: what is measured on them is no held-out likelihood"
            )

    def held_out(self) -> Rows:
        """Return the held-out rows. Raises DataError if no document is held out."""
        if not self.held_out_documents:
            raise DataError(
                "there is no held-out text to measure on",
                asked="an evaluation on held-out text",
                found=f"no held-out document of {self.training.description}",
                fix="raise data.held_out, give text of more than one document, or name other text under "
                "data.evaluation: {files: …}",
            )
        rows = tuple(_held_out_rows(documents, self.data) for documents in self.held_out_documents)
        if len(rows) == 1:
            return rows[0]
        return MixedRows(parts=rows, weights=_weights(self.data))


def run_text(plan: Plan, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> RunText:
    """Return the text of a run, tokenized, split and packed. Raises DataError for a source without enough text."""
    data, seed = plan.mapping.data, plan.mapping.seed
    sources: Sequence[Text] = data.mixture or (data,)
    streams = tuple(DocumentStream(source, tokenizer) for source in sources) if data.streaming else ()
    if streams:
        sides = [_first_of(stream, plan) for stream in streams]
    else:
        share = data.held_out_share
        documents = (
            open_documents(source, tokenizer, reporter=reporter, processes=data.processes) for source in sources
        )
        sides = [split_documents(part, share, seed=seed) for part in documents]
    parts = tuple(_packed(training, data) for training, _ in sides)
    held = tuple(held_out for _, held_out in sides if held_out is not None)
    trained_on = 0
    if data.evaluation is not None:
        named = open_documents(data.evaluation, tokenizer, reporter=reporter, processes=data.processes)
        seen = numpy.concatenate([documents.hashes for documents, _ in sides])
        held, trained_on = (named,), int(numpy.isin(named.hashes, seen).sum())
    elif len(held) != len(sides):
        # A mixture is measured as it is trained on, or not at all.
        held = ()
    training = MixedRows(parts=parts, weights=_weights(data)) if data.mixture else parts[0]
    return RunText(training=training, held_out_documents=held, data=data, streams=streams, trained_on=trained_on)


def _first_of(stream: DocumentStream, plan: Plan) -> tuple[TokenizedDocuments, TokenizedDocuments | None]:
    """Return the documents of a stream that calibration and evaluation read, training and held out."""
    data, row = plan.mapping.data, plan.mapping.data.sequence_length
    evaluated = [stage.stage.evaluation.batches * stage.batch_size for stage in plan.stages if stage.stage.evaluation]
    training, held_out = first_documents(
        stream,
        # Calibration reads the first half, and the projector report the other.
        training_tokens=max(2 * plan.mapping.calibration.tokens, CALIBRATION_ROWS * row),
        held_out_tokens=max([(plan.mapping.evaluate or Evaluate()).tokens, *(rows * row for rows in evaluated)]) + row,
        held_out=data.held_out_share,
        seed=plan.mapping.seed,
    )
    if held_out is None and data.held_out_share:
        raise DataError(
            f"no document of '{stream.name}' is held out",
            found=f"{len(training):,} documents in a whole pass, and held_out: {data.held_out_share:g}",
            fix="data: {held_out: …} with a larger share, evaluation: {files: …} for other text to measure on, "
            "held_out: 0 for none, or leave out streaming",
        )
    return training, held_out


def evaluation_texts(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, reporter: Reporter, text: RunText | None = None
) -> tuple[dict[str, list[Batch]], dict[str, str]]:
    """Return batches and one-line descriptions by name: the held-out text, then each of `also`.

    `text` is that of the run, read here if it is not given.
    """
    settings, data = plan.mapping.evaluate or Evaluate(), plan.mapping.data
    held_out = (text or run_text(plan, tokenizer, reporter)).held_out()
    rows: dict[str, Rows] = {HELD_OUT: held_out}
    descriptions = {HELD_OUT: held_out.description}
    for source in settings.also:
        found = _held_out_rows(open_documents(source, tokenizer, reporter=reporter, processes=data.processes), data)
        rows[found.name] = found
        descriptions[found.name] = f"another kind: {found.description}"
    return {name: read_batches(part, settings.tokens, data.batch_size) for name, part in rows.items()}, descriptions


def named_hashes(plan: Plan, tokenizer: PreTrainedTokenizerBase, reporter: Reporter, text: RunText) -> set[int]:
    """Return the hashes of the documents of `data.evaluation` and of the texts of `evaluate.also`.

    What is held out of the training text itself is other text by construction.
    """
    also = () if plan.mapping.evaluate is None else plan.mapping.evaluate.also
    named = [
        open_documents(source, tokenizer, reporter=reporter, processes=plan.mapping.data.processes) for source in also
    ]
    if plan.mapping.data.evaluation is not None:
        named += text.held_out_documents
    return {int(value) for documents in named for value in documents.hashes}


def read_batches(rows: Rows, tokens: int, batch_size: int) -> list[Batch]:
    """Return the first rows, of about `tokens` tokens but at least one, in batches."""
    most = max(1, tokens // rows.sequence_length) if rows.lengths is None else rows_of_tokens(rows, tokens)
    return list(first_rows(rows, most).batches(batch_size, origin="held-out text"))


def _size(rows: Rows) -> str:
    most = "" if rows.tokens == len(rows) * rows.sequence_length else "at most "
    return f"{rows.tokens:,} tokens of {rows.description} in {len(rows):,} rows of {most}{rows.sequence_length}"


def _weights(data: Data) -> tuple[float, ...]:
    return tuple(source.weight for source in data.mixture or ())


def _packed(documents: TokenizedDocuments, data: Data) -> PackedRows:
    return pack(documents, data.sequence_length, packing=data.packing, isolated=data.documents == "isolated")


def _held_out_rows(documents: TokenizedDocuments, data: Data) -> PackedRows:
    """Return rows of text to measure on: as those that are trained on, but one shorter row of a short text."""
    if data.packing == "wrapped" and documents.tokens < data.sequence_length:
        isolated = data.documents == "isolated"
        return pack(documents, data.sequence_length, packing="best_fit", isolated=isolated)
    return _packed(documents, data)


def draw_lines(stage: StagePlan, order: BatchOrder, rows: Rows) -> Iterator[str]:
    """Yield a line per source of a mixture: how many rows a stage draws of it."""
    if not isinstance(rows, MixedRows):
        return
    total = order.distinct * order.batch_size
    for part, count in zip(rows.parts, order.drawn(), strict=True):
        yield (
            f"stage {stage.stage.name}: {count:,} rows of {part.name}, {count / total:.1%} of the stage's rows and "
            f"{count / len(part):.2f} times that source"
        )
