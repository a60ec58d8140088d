"""Comparison of two models on the same tokens of several texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.errors import DataError
from xarch_kd.evaluation.likelihood import ModelPaths, batches_of, position_buckets, position_curve, token_nll
from xarch_kd.evaluation.results import Evaluation, LikelihoodResult, PositionResult
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES, PairedDifference, paired_bootstrap
from xarch_kd.losses.tokens import IGNORED_LABEL
from xarch_kd.run.report import Reporter


def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    texts: Mapping[str, Tensor | Sequence[Batch]],
    *,
    descriptions: Mapping[str, str] | None = None,
    teacher_name: str = "teacher",
    student_name: str = "student",
    teacher_paths: ModelPaths = None,
    student_paths: ModelPaths = None,
    batch_size: int = 4,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Return the likelihood of teacher and student on each text, with a paired interval of the difference.

    `texts` maps a name to packed rows [rows, T] (integers, no padding), or to batches, whose padding and tokens left
    out by labels do not count; rows may differ in length between texts. `descriptions` gives the kind of each text,
    which is printed beside its name. Models stay on their device and in their dtype. `reporter` shows the progress.

    Raises:
        DataError: no text, or rows that are empty, too short or hold tokens outside a vocabulary.
        NonFiniteLoss: a likelihood is NaN or infinite.
    """
    if not texts:
        raise DataError("There is no text to measure.", found="an empty mapping", allowed="name -> rows [rows, T]")
    unknown = sorted(set(descriptions or {}) - set(texts))
    if unknown:
        raise DataError("A description has no text.", found=", ".join(unknown), allowed=" | ".join(texts))
    likelihood = []
    for name, rows in texts.items():
        batches = batches_of(rows, batch_size)
        tokens = sum(batch.tokens for batch in batches)
        nll = {}
        for model, words, paths in ((teacher, "teacher", teacher_paths), (student, "student", student_paths)):
            with (reporter or Reporter.silent()).work(f"measuring {name}, {words}", tokens, "tokens") as work:
                nll[words] = token_nll(model, batches, paths=paths, progress=work.at)
        difference = paired_bootstrap(nll["teacher"], nll["student"], level=level, resamples=resamples, seed=seed)
        description = (descriptions or {}).get(name, "")
        likelihood.append(_result(name, description, batches, nll["teacher"], nll["student"], difference))
    return Evaluation(
        teacher=teacher_name,
        student=student_name,
        level=level,
        resamples=resamples,
        seed=seed,
        likelihood=tuple(likelihood),
    )


def _result(
    name: str,
    description: str,
    batches: Sequence[Batch],
    teacher: Tensor,
    student: Tensor,
    difference: PairedDifference,
) -> LikelihoodResult:
    return LikelihoodResult(
        text=name,
        description=description,
        rows=teacher.shape[0],
        tokens=int((~teacher.isnan()).sum()),
        fingerprint=token_fingerprint(batches),
        teacher_nll=float(teacher.double().nanmean()),
        student_nll=float(student.double().nanmean()),
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        p_value=difference.p_value,
        by_position=_positions(teacher, student),
    )


def token_fingerprint(rows: Tensor | Sequence[Batch]) -> str:
    """Return a hash of these rows of tokens, and of which of them count, 16 hexadecimal digits.

    It does not depend on how rows are divided into batches.
    """
    digest = hashlib.sha256()
    for batch in batches_of(rows, batch_size=max(1, len(rows))):
        counts = batch.next_tokens.cpu() != IGNORED_LABEL
        ids = batch.input_ids.cpu().to(torch.int64)
        lengths = [ids.shape[1]] * len(ids) if batch.attention_mask is None else batch.attention_mask.sum(1).tolist()
        for row, count, length in zip(ids, counts, lengths, strict=True):
            digest.update(f"{length}".encode() + row[:length].numpy().tobytes() + count[:length].numpy().tobytes())
    return digest.hexdigest()[:16]


def _positions(teacher: Tensor, student: Tensor) -> tuple[PositionResult, ...]:
    curves = zip(position_buckets(teacher.shape[1]), position_curve(teacher), position_curve(student), strict=True)
    return tuple(
        PositionResult(start=start, stop=stop, teacher_nll=first, student_nll=second)
        for (start, stop), first, second in curves
        if not math.isnan(first)
    )
