"""Fingerprint of a run: what its mapping file, text, tokenizer and models are at this moment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xarch_kd.data.corpus import Corpus
from xarch_kd.models.loading.identity import config_identity, model_identity
from xarch_kd.models.loading.tokens import tokenizer_identity
from xarch_kd.planning.plan import Plan
from xarch_kd.run.fingerprint import Fingerprint, installed_packages

MAPPING = "mapping file"
TRAINING_TEXT = "training text"
HELD_OUT_TEXT = "held-out text"
TOKENIZER = "tokenizer"


def run_fingerprint(plan: Plan, tokenizer: PreTrainedTokenizerBase, rows: Tensor, held_out: Corpus) -> Fingerprint:
    """Return the fingerprint of a run about to train on `rows`. Raises ModelError for models that cannot be read."""
    return Fingerprint(
        inputs={
            MAPPING: mapping_fingerprint(plan),
            TRAINING_TEXT: rows_fingerprint(rows),
            HELD_OUT_TEXT: held_out_fingerprint(held_out),
            **model_inputs(plan, tokenizer),
        },
        packages=installed_packages(),
        working_directory=str(Path.cwd()),
    )


def mapping_fingerprint(plan: Plan) -> str:
    """Return the SHA-256 of the mapping file's content, without layout and comments, and of custom objects' names."""
    content = plan.mapping.model_dump(mode="json")
    names = plan.custom.qualified_names()
    if names:
        content["custom"] = names
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rows_fingerprint(rows: Tensor) -> str:
    """Return size and hash of the rows [rows, time] that a run trains on, in their order."""
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return f"{rows.shape[0]:,} rows of {rows.shape[1]:,} tokens, sha256 {digest[:16]}"


def held_out_fingerprint(held_out: Corpus) -> str:
    """Return size and hash of the documents that a run is evaluated on."""
    return f"{len(held_out.documents):,} documents, sha256 {held_out.sha256[:16]}"


def model_inputs(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the inputs that are not text: the tokenizer, the teacher's files, and the student's if it has any."""
    teacher, student = plan.mapping.teacher, plan.mapping.student
    found = {TOKENIZER: tokenizer_identity(tokenizer)}
    found |= {f"teacher, {name}": value for name, value in model_identity(teacher.model, teacher.revision).items()}
    own: dict[str, str] = {}
    if student.model is not None:
        own = model_identity(student.model, student.revision)
    elif isinstance(student.config, str):
        own = config_identity(student.config)
    return found | {f"student, {name}": value for name, value in own.items()}
