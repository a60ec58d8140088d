"""The texts that a mapping file names, as corpora and as rows."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.corpus import Corpus, read_corpus
from xarch_kd.data.rows import pack
from xarch_kd.mapping_file.schema import Evaluate, Text
from xarch_kd.planning.plan import Plan

HELD_OUT = "held-out"


def corpus_of(text: Text) -> Corpus:
    """Return the corpus of a text source."""
    return read_corpus(
        builtin=text.builtin,
        files=text.files,
        dataset=text.dataset,
        dataset_config=text.dataset_config,
        split=text.split,
        column=text.column,
    )


def training_and_held_out(plan: Plan) -> tuple[Corpus, Corpus]:
    """Return the two parts of the training corpus; they share no paragraph."""
    data = plan.mapping.data
    return corpus_of(data).split(data.held_out, seed=plan.mapping.seed)


def evaluation_texts(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return rows and one-line descriptions by name: the held-out part of the training corpus, then each of `also`."""
    settings = plan.mapping.evaluate or Evaluate()
    length = plan.mapping.data.sequence_length
    most = max(1, settings.tokens // length)
    _, held_out = training_and_held_out(plan)
    rows = {HELD_OUT: pack(held_out, tokenizer, length, most=most)}
    descriptions = {HELD_OUT: held_out.description}
    for source in settings.also:
        corpus = corpus_of(source)
        rows[corpus.name] = pack(corpus, tokenizer, length, most=most)
        descriptions[corpus.name] = f"another kind: {corpus.description}"
    return rows, descriptions
