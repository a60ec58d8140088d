"""SentencePiece-like tokenizers in GGUF: BPE with byte fallback, whose merges llama.cpp takes from scores of tokens.

llama.cpp joins the two neighbours whose joint text is the token of the highest score; the tokenizers library follows a
list of merges. The two agree if every way to split a token into two tokens is in the list, the merges of one token
follow each other, and the score falls with the place in the list.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

SPACE: Final = "▁"
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACED: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDED: Final = {"type": "Prepend", "prepend": SPACE}


def is_byte(token: str) -> bool:
    """Return whether a token stands for one byte."""
    return _BYTE.fullmatch(token) is not None


def unheld_sentencepiece(whole: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp would split text otherwise than a serialized tokenizer, or None."""
    model = whole["model"]
    if sum(map(is_byte, model["vocab"])) != 256:
        return "byte fallback without a token for each byte"
    if space_prefix(whole) is None:
        return f"a normalizer {whole['normalizer']} with the pre-tokenizer {whole['pre_tokenizer']}"
    return _unheld_merges(model["vocab"], pairs_of(model), {token["content"] for token in whole["added_tokens"]})


def space_prefix(whole: Mapping[str, Any]) -> bool | None:
    """Return whether a space is put before a text; None if spaces are treated as llama.cpp does not."""
    normalizer, before = whole["normalizer"], whole["pre_tokenizer"]
    if normalizer is None and before is not None and before["type"] == "Metaspace":
        if before["replacement"] != SPACE or before["split"]:
            return None
        if before["prepend_scheme"] == "first":
            warnings.warn(
                "llama.cpp puts a space before the text after a special token too, and this tokenizer before the first "
                "text alone",
                stacklevel=5,
            )
        return before["prepend_scheme"] != "never"
    # Gemma's splits at spaces, of which none is left by then.
    if before is not None and (before["type"] != "Split" or before["pattern"] != {"String": " "}):
        return None
    steps = [normalizer] if normalizer is None or normalizer["type"] != "Sequence" else normalizer["normalizers"]
    return {1: False, 2: True}[len(steps)] if steps in ([_REPLACED], [_PREPENDED, _REPLACED]) else None


def pairs_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a model's merges as pairs."""
    split = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(first, second) for first, second in split]


def token_scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Return a score for each token, which falls with the place of its first merge; others are below all of them."""
    place: dict[str, int] = {}
    for first, second in merges:
        place.setdefault(first + second, len(place))
    return [-float(place.get(token, len(place))) for token in tokens]


def _unheld_merges(table: Collection[str], merges: Sequence[tuple[str, str]], special: Collection[str]) -> str | None:
    plain = {token for token in table if token not in special and not is_byte(token)}
    listed, done, previous = set(merges), set(), ""
    for first, second in merges:
        token = first + second
        if token != previous and token in done:
            return f"merges of '{token}' apart from each other"
        done.add(token)
        previous = token
    for token in plain:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in plain and pair[1] in plain and pair not in listed:
                return f"no merge of '{pair[0]}' and '{pair[1]}', whose joint text is a token"
    return None
