"""Comparison of two tokenizers: their token tables are compared, not only the sizes."""

from __future__ import annotations

import hashlib
import json
import warnings

from transformers import PreTrainedTokenizerBase

from xarch_kd.errors import ModelError


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


def _table(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
