"""Texts of a mapping file, as corpora and as token rows."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.corpus import Corpus, read_corpus
from xarch_kd.data.rows import pack
from xarch_kd.mapping_file.schema import Evaluate, Text
from xarch_kd.planning.plan import Plan
from xarch_kd.run.report import Reporter

HELD_OUT = "held-out"


def corpus_of(text: Text) -> Corpus:
    """Return the corpus of a text source."""
    return read_corpus(
        builtin=text.builtin,
        files=text.files,
        dataset=text.dataset,
        dataset_config=text.dataset_config,
        split=text.split,
        column=text.column or "text",
    )


def training_and_held_out(plan: Plan) -> tuple[Corpus, Corpus]:
    """Return the two parts of the training corpus; they share no paragraph."""
    data = plan.mapping.data
    return corpus_of(data).split(data.held_out, seed=plan.mapping.seed)


def packed(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, plan: Plan, reporter: Reporter, *, most: int | None = None
) -> Tensor:
    """Return the corpus as token rows [rows, time] of the plan's sequence length, at most `most` of them."""
    documents = len(corpus.documents) if most is None else None
    with reporter.work(f"tokenizing {corpus.name}", documents, "documents") as work:
        return pack(corpus, tokenizer, plan.mapping.data.sequence_length, most=most, progress=work.at)


def evaluation_texts(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return rows and one-line descriptions by name: the held-out part of the training corpus, then each of `also`."""
    settings = plan.mapping.evaluate or Evaluate()
    most = max(1, settings.tokens // plan.mapping.data.sequence_length)
    _, held_out = training_and_held_out(plan)
    rows = {HELD_OUT: packed(held_out, tokenizer, plan, reporter, most=most)}
    descriptions = {HELD_OUT: held_out.description}
    for source in settings.also:
        corpus = corpus_of(source)
        rows[corpus.name] = packed(corpus, tokenizer, plan, reporter, most=most)
        descriptions[corpus.name] = f"another kind: {corpus.description}"
    return rows, descriptions
