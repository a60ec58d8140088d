"""Tokenizer in the metadata of a GGUF file.

llama.cpp's `gpt2` is byte-level BPE with a pre-tokenizer that it has by name, its `llama` is SentencePiece's BPE.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from xarch_kd.errors import ModelError
from xarch_kd.models.gguf.layout import Value
from xarch_kd.models.gguf.sentencepiece import is_byte, pairs_of, space_prefix, token_scores, unheld_sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_REST: Final = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LETTERS: Final = r"[^\r\n\p{L}\p{N}]?"
# Steps of the pre-tokenizer -> its name in llama.cpp (`src/llama-vocab.cpp`); a pattern stands for a split by it.
PRE_TOKENIZERS: Final[Mapping[tuple[str, ...], str]] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (rf"{_SUFFIXES}{_LETTERS}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{_REST}", "bytes"): "llama-bpe",
    (rf"{_SUFFIXES}{_LETTERS}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+{_REST}", "bytes"): "qwen2",
    (
        rf"{_SUFFIXES}{_LETTERS}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+{_REST}",
        "bytes",
    ): "qwen35",
}
# The only one that takes a word that is a token as it is, whatever the merges.
_IGNORES_MERGES: Final = "llama-bpe"
_SPECIAL: Final = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "sep_token_id": "seperator_token_id",
    "pad_token_id": "padding_token_id",
    "mask_token_id": "mask_token_id",
}


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Value]:
    """Return the metadata of a tokenizer, padded to a model's `vocabulary` with unused tokens.

    Raises `ModelError` for what llama.cpp would tokenize otherwise; warns of what it passes over.
    """
    whole = _serialized(tokenizer)
    tokens, types = _tokens(whole["model"], whole["added_tokens"], vocabulary)
    found: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **(_sentencepiece(whole, tokens) if whole["model"]["byte_fallback"] else _byte_level(whole)),
        **_added_around(tokenizer),
    }
    for name, key in _SPECIAL.items():
        number = getattr(tokenizer, name, None)
        if number is not None:
            found[f"tokenizer.ggml.{key}"] = int(number)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return found if template is None else found | {"tokenizer.chat_template": template}


def no_tokenizer_metadata() -> dict[str, Value]:
    """Return the metadata of a file without a tokenizer, which then takes token ids only."""
    return {"tokenizer.ggml.model": "none"}


def _serialized(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unheld(f"a {type(tokenizer).__name__}, which is not one of the tokenizers library", "byte-level BPE")
    whole = json.loads(backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise _unheld(f"a tokenizer of type {model['type']}", "byte-level BPE, or BPE with byte fallback")
    unusual = [
        f"{name}: {model[name]}"
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if unusual:
        raise _unheld(", ".join(unusual), "BPE without them")
    return whole


def _sentencepiece(whole: Mapping[str, Any], tokens: list[str]) -> dict[str, Value]:
    reason = unheld_sentencepiece(whole)
    if reason is not None:
        raise _unheld(reason, "BPE with byte fallback as SentencePiece's, of which each merge of two tokens is listed")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": token_scores(tokens, pairs_of(whole["model"])),
        "tokenizer.ggml.add_space_prefix": bool(space_prefix(whole)),
    }


def _byte_level(whole: Mapping[str, Any]) -> dict[str, Value]:
    model, normalizer = whole["model"], whole["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unheld(f"a normalizer of type {normalizer['type']}", "no normalizer, or NFC")
    if normalizer is not None:
        warnings.warn(
            "llama.cpp does not normalize text: text that is not in Unicode's form NFC gets other tokens there",
            stacklevel=4,
        )
    pre = _pre_tokenizer(whole)
    if bool(model.get("ignore_merges")) != (pre == _IGNORES_MERGES):
        raise _unheld(f"ignore_merges: {model.get('ignore_merges')}", f"ignore_merges with {_IGNORES_MERGES} alone")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs_of(model)],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _pre_tokenizer(whole: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer. Raises `ModelError` for one that it lacks."""
    given = whole["pre_tokenizer"] or {}
    parts = given.get("pretokenizers", [given])
    name = PRE_TOKENIZERS.get(tuple(_step(part) for part in parts))
    if name is None:
        raise _unheld(
            f"a pre-tokenizer {json.dumps(parts)[:400]}", f"those of {', '.join(PRE_TOKENIZERS.values())}, unchanged"
        )
    return name


def _step(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "words" if part["use_regex"] else "bytes"
    if kind == "Digits" and part["individual_digits"]:
        return "digits"
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex"))
    return f"unknown: {kind}"


def _tokens(model: Mapping[str, Any], added: list[dict[str, Any]], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return the text and type of each token id below `vocabulary`."""
    extra = {int(token["id"]): token for token in added}
    named = {number: token for token, number in model["vocab"].items()} | {
        number: token["content"] for number, token in extra.items()
    }
    if max(named) >= vocabulary:
        raise ModelError(
            "The tokenizer has more tokens than the model has embeddings.",
            found=f"token {max(named)}, {vocabulary} embeddings",
            fix="export with the tokenizer that the student was trained with",
        )
    stripping = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if stripping:
        warnings.warn(
            "llama.cpp does not strip spaces around a token, nor match whole words only: text around "
            f"{', '.join(stripping[:4])} gets other tokens there",
            stacklevel=4,
        )
    texts, types = [], []
    for number in range(vocabulary):
        texts.append(named.get(number, f"[PAD{number}]"))
        if model["byte_fallback"] and texts[-1] == model.get("unk_token"):
            types.append(UNKNOWN)
        elif model["byte_fallback"] and is_byte(texts[-1]):
            types.append(BYTE)
        elif number in extra:
            types.append(CONTROL if extra[number]["special"] else USER_DEFINED)
        else:
            types.append(NORMAL if number in named else UNUSED)
    return texts, types


def _added_around(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """Return whether the tokenizer puts bos and eos tokens around a text. Raises `ModelError` for other tokens."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for after in (False, True):
            if around == [*(bos if before else []), *bare, *(eos if after else [])]:
                return {"tokenizer.ggml.add_bos_token": before, "tokenizer.ggml.add_eos_token": after}
    raise _unheld(f"special tokens around a text: {around} where the text is {bare}", "bos before it, eos after it")


def _unheld(found: str, allowed: str) -> ModelError:
    return ModelError(
        "GGUF cannot hold this tokenizer: llama.cpp would split text into other tokens.",
        found=found,
        allowed=allowed,
        fix="move tokenizer.json out of a copy of the student's folder: the file then takes token ids only",
    )
