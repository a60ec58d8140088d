"""Fingerprint of a run: what its mapping file, text, tokenizer and models are at this moment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from xarch_kd.data.rows import Rows
from xarch_kd.job.texts import RunText
from xarch_kd.models.loading.identity import config_identity, model_identity
from xarch_kd.models.loading.load import load_tokenizer
from xarch_kd.models.loading.tokens import tokenizer_identity
from xarch_kd.planning.plan import Plan
from xarch_kd.run.fingerprint import Fingerprint, installed_packages

MAPPING = "mapping file"
TRAINING_TEXT = "training text"
HELD_OUT_TEXT = "held-out text"
TOKENIZER = "tokenizer"


def run_fingerprint(plan: Plan, tokenizer: PreTrainedTokenizerBase, text: RunText) -> Fingerprint:
    """Return the fingerprint of a run about to train on `text`. Raises ModelError for models that cannot be read."""
    return Fingerprint(
        inputs={
            MAPPING: mapping_fingerprint(plan),
            TRAINING_TEXT: rows_fingerprint(text.training),
            HELD_OUT_TEXT: held_out_fingerprint(text),
            **teacher_inputs(plan, tokenizer),
            **student_inputs(plan),
        },
        packages=installed_packages(),
        working_directory=str(Path.cwd()),
    )


def evaluated_inputs(plan: Plan, tokenizer: PreTrainedTokenizerBase, text: RunText) -> dict[str, str]:
    """Return the inputs that an evaluation of a run reads: held-out text, tokenizer, the teacher's files."""
    return {HELD_OUT_TEXT: held_out_fingerprint(text), **teacher_inputs(plan, tokenizer)}


def mapping_fingerprint(plan: Plan) -> str:
    """Return the SHA-256 of the mapping file's content, without layout and comments, and of custom objects' names."""
    # The number of processes that tokenize changes no token.
    content = plan.mapping.model_dump(mode="json", exclude={"data": {"processes"}})
    names = plan.custom.qualified_names()
    if names:
        content["custom"] = names
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rows_fingerprint(rows: Rows) -> str:
    """Return size and hash of the rows that a run trains on, in their order."""
    return f"{len(rows):,} rows of {rows.sequence_length:,} tokens, sha256 {rows.fingerprint[:16]}"


def held_out_fingerprint(text: RunText) -> str:
    """Return size and hash of the documents that a run is evaluated on."""
    documents = f"{sum(len(part) for part in text.held_out_documents):,} documents"
    if text.streams:
        documents = "streamed documents"
    return f"{documents}, sha256 {text.held_out_fingerprint[:16]}"


def teacher_inputs(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer and the teacher's files."""
    teacher = plan.mapping.teacher
    found = {f"teacher, {name}": value for name, value in model_identity(teacher.model, teacher.revision).items()}
    return {TOKENIZER: tokenizer_identity(tokenizer), **found}


def student_inputs(plan: Plan) -> dict[str, str]:
    """Return the files that the student is made from, none where it is made from the teacher or the mapping file."""
    student = plan.mapping.student
    own: dict[str, str] = {}
    if student.model is not None:
        own = model_identity(student.model, student.revision)
        # The student is saved with its own.
        own[TOKENIZER] = tokenizer_identity(load_tokenizer(student.tokenizer or student.model, student.revision))
    elif isinstance(student.config, str):
        own = config_identity(student.config)
    return {f"student, {name}": value for name, value in own.items()}
