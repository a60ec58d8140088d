"""Comparison of two tokenizers: their token tables and how they cut text, not only the sizes."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Final

from transformers import PreTrainedTokenizerBase

from xarch_kd.errors import ModelError

_ONE_TOKENIZER: Final = (
    "use a teacher and a student of one tokenizer, or name the teacher's as the student's (student: {tokenizer: …}) if "
    "the student was trained with it"
)
# Text on which tokenizers of one table differ: letter case, spaces, numbers, code, accents, other scripts.
_PROBES: Final = (
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "  two  spaces\tand\n\nline breaks \n",
    "def f(x_1): return {x_1: -3.14e-10}  # HTTP://a.b/C?d=e",
    "Àé ﬁ ½ 中文字 Привет مرحبا 🙂👩\u200d🚀",
)


def token_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a tokenizer's table of ids and tokens, as 64 hexadecimal digits."""
    table = json.dumps(sorted(_table(tokenizer).items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(table.encode("ascii")).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return size and SHA-256 of a tokenizer as it cuts text: tokens, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    # Set by each call, and not by the tokenizer's files.
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    content = {
        "class": type(tokenizer).__name__,
        "rules": rules,
        "tokens": token_fingerprint(tokenizer),
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{len(tokenizer):,} tokens, sha256 {digest[:16]}"


def shared_vocabulary(
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_rows: int,
    student_rows: int,
) -> int:
    """Return the number of leading rows of both output layers that stand for the same tokens.

    Rows past the tokens (a padded vocabulary) and tokens that only one side has at the end are cut off, with a
    warning. Raises `ModelError` if an id stands for different tokens, even if both tables have equal length.
    """
    teacher, student = _table(teacher_tokenizer), _table(student_tokenizer)
    differing = sorted(index for index in teacher.keys() & student.keys() if teacher[index] != student[index])
    alone = teacher.keys() ^ student.keys()
    common = teacher.keys() & student.keys()
    if differing or not common or (alone and min(alone) < max(common)):
        first = differing[0] if differing else min(alone)
        raise ModelError(
            f"Teacher and student do not share a vocabulary: {len(differing)} ids stand for different tokens.",
            asked=f"{len(teacher)} teacher tokens, {len(student)} student tokens",
            found=f"id {first}: teacher {teacher.get(first)!r}, student {student.get(first)!r}",
            fix="token objectives need one vocabulary: give both sides the teacher's tokenizer, or align features only",
        )
    size = min(teacher_rows, student_rows, *alone)
    if size <= max(common):
        raise ModelError(
            "A model has fewer output rows than its tokenizer has tokens.",
            found=f"{size} rows, tokens up to id {max(common)}",
        )
    if not teacher_rows == student_rows == size:
        warnings.warn(
            f"Only the first {size} of {teacher_rows} teacher and {student_rows} student vocabulary rows are compared; "
            "the others stand for no token that both have.",
            UserWarning,
            stacklevel=2,
        )
    return size


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: int, *, side: str) -> None:
    """Raise `ModelError` if a token of `tokenizer` has no row in the embedding of the model `side`, of `rows` rows."""
    highest = max(_table(tokenizer), default=-1)
    if highest >= rows:
        raise too_many_tokens(highest + 1, rows, side=side)


def too_many_tokens(tokens: int, rows: int, *, side: str) -> ModelError:
    """Return the error for a tokenizer with more tokens than the embedding of the model `side` has rows."""
    return ModelError(
        f"The tokenizer has more tokens than the embedding of the {side} has rows.",
        found=f"{tokens} tokens, {rows} rows",
        fix="use the tokenizer that the model was saved with, or add the rows: model.resize_token_embeddings(…), then "
        "save_pretrained",
    )


def check_same_ids(
    teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase, student_rows: int
) -> None:
    """Raise `ModelError` unless both tokenizers give text the same ids, as a student that reads the teacher's needs.

    Tokens that only one side has, after all common ones, pass if the student has rows for them. Special tokens around a
    text and chat templates are not compared.
    """
    teacher, student = _table(teacher_tokenizer), _table(student_tokenizer)
    last = max(teacher.keys() & student.keys(), default=max(teacher))
    differing = sorted(index for index, token in teacher.items() if index <= last and token != student.get(index))
    if differing:
        first = differing[0]
        raise ModelError(
            f"The student reads the teacher's token ids, but {len(differing)} of them do not stand for the same token "
            "in its own tokenizer.",
            asked=f"{len(teacher)} teacher tokens, {len(student)} student tokens",
            found=f"id {first}: teacher {teacher.get(first)!r}, student {student.get(first)!r}",
            fix=_ONE_TOKENIZER,
        )
    for text in _PROBES:
        own, other = (
            tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        if own != other:
            raise ModelError(
                "The student reads the teacher's token ids, but its own tokenizer cuts text in another way.",
                asked=repr(text),
                found=f"teacher {_named(teacher, other)}; student {_named(student, own)}",
                fix=_ONE_TOKENIZER,
            )
    for tokenizer in (teacher_tokenizer, student_tokenizer):
        check_rows(tokenizer, student_rows, side="student")


def _named(table: dict[int, str], ids: list[int]) -> str:
    shown = " ".join(repr(table.get(index)) for index in ids[:8])
    return shown + (" …" if len(ids) > 8 else "")


def _table(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
