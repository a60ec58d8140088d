"""Contents of a mapping file's text: documents, tokens, labels, and what packing makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.mixture import MixedRows
from xarch_kd.data.packing import PackedRows, Row
from xarch_kd.job.models import load_run_tokenizer
from xarch_kd.job.texts import run_text
from xarch_kd.planning.plan import Plan
from xarch_kd.run.report import Reporter


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Documents of `low` to `high` tokens, both included: a power of two to the token before the next one."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text of a row: tokens in a run that are all to be predicted (`counted`) or all context.

    `starts_document` is true for the first piece of an isolated document.
    """

    text: str
    counted: bool
    starts_document: bool


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """Contents of the training part of one source.

    `held_out` are the documents of the source that are kept for evaluation. `counted` are the tokens to be predicted,
    None where that is all of them; `uncounted_documents` have none. `repeated` are documents whose content another
    document before them has. `longer` are documents of more tokens than a row. Of `cut` documents a rest is left out
    because a row holds one document. `waste` is the share of positions that are padding.
    """

    name: str
    description: str
    weight: float
    documents: int
    tokens: int
    held_out: int
    counted: int | None
    uncounted_documents: int
    repeated: int
    longer: int
    lengths: tuple[LengthBin, ...]
    rows: int
    row_tokens: int
    cut: int
    waste: float
    first_rows: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Contents of a mapping file's text; `weight` of its sources are shares that sum to 1."""

    sequence_length: int
    packing: str
    isolated: bool
    sources: tuple[SourceReport, ...]


def report_data(plan: Plan, reporter: Reporter, *, rows: int) -> DataReport:
    """Return the contents of a plan's text, with the first `rows` rows of each source. Raises DataError as a run does.

    The text is tokenized by the teacher's tokenizer, split and packed as it is for a run; no weights are read.
    """
    tokenizer = load_run_tokenizer(plan)
    text = run_text(plan, tokenizer, reporter)
    training = text.training
    parts = training.parts if isinstance(training, MixedRows) else (training,)
    is_of_sources = plan.mapping.data.evaluation is None and len(text.held_out_documents) == len(parts)
    held_out = [len(part) for part in text.held_out_documents] if is_of_sources else [0] * len(parts)
    sources = []
    for part, left, weight in zip(parts, held_out, training.weights, strict=True):
        assert isinstance(part, PackedRows)
        share = weight / sum(training.weights)
        sources.append(source_report(part, tokenizer, rows=rows, held_out=left, weight=share))
    return DataReport(
        sequence_length=training.sequence_length,
        packing=plan.mapping.data.packing,
        isolated=plan.mapping.data.documents == "isolated",
        sources=tuple(sources),
    )


def source_report(
    packed: PackedRows, tokenizer: PreTrainedTokenizerBase, *, rows: int, held_out: int = 0, weight: float = 1.0
) -> SourceReport:
    """Return the contents of one source, whose training part is `packed`, with its first `rows` rows."""
    documents = packed.documents
    counted = counted_tokens(documents)
    return SourceReport(
        name=packed.name,
        description=packed.description,
        weight=weight,
        documents=len(documents),
        tokens=documents.tokens,
        held_out=held_out,
        counted=None if counted is None else int(counted.sum()),
        uncounted_documents=0 if counted is None else int((counted == 0).sum()),
        repeated=len(documents) - len(numpy.unique(documents.hashes)),
        longer=int((documents.lengths > packed.sequence_length).sum()),
        lengths=histogram(documents.lengths),
        rows=len(packed),
        row_tokens=packed.tokens,
        cut=packed.cut,
        waste=packed.waste,
        first_rows=tuple(tuple(pieces(packed.row(row), tokenizer)) for row in range(min(rows, len(packed)))),
    )


def counted_tokens(documents: TokenizedDocuments) -> numpy.ndarray | None:
    """Return the number of tokens to be predicted of each document [documents], None where that is all of them."""
    if not documents.has_labels:
        return None
    return numpy.array([int(documents.counted(number).sum()) for number in range(len(documents))])  # type: ignore[union-attr]


def histogram(lengths: numpy.ndarray) -> tuple[LengthBin, ...]:
    """Return documents and tokens by length [documents], in bins from each power of two to the next."""
    exponents = numpy.frexp(lengths.astype(numpy.float64))[1] - 1
    found = []
    for exponent in range(int(exponents.min()), int(exponents.max()) + 1):
        inside = exponents == exponent
        found.append(
            LengthBin(
                low=2**exponent,
                high=2 ** (exponent + 1) - 1,
                documents=int(inside.sum()),
                tokens=int(lengths[inside].sum()),
            )
        )
    return tuple(found)


def pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Yield the text of a row in runs of tokens that are counted or not, in one isolated document."""
    size = len(row.ids)
    counted = numpy.ones(size, dtype=bool) if row.counted is None else row.counted
    starts = numpy.zeros(size, dtype=bool) if row.positions is None else row.positions == 0
    borders = numpy.flatnonzero((counted[1:] != counted[:-1]) | starts[1:]) + 1
    for start, stop in pairwise([0, *borders.tolist(), size]):
        text = tokenizer.decode(row.ids[start:stop].tolist(), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield Piece(text=text, counted=bool(counted[start]), starts_document=bool(starts[start]))
