"""Comparison of two models on the same tokens of several texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import DataError
from xarch_kd.evaluation.likelihood import position_buckets, position_curve, token_nll
from xarch_kd.evaluation.results import Evaluation, LikelihoodResult, PositionResult
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES, PairedDifference, paired_bootstrap
from xarch_kd.run.report import Reporter

ModelPaths = Mapping[str, str | None] | object | None


def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    texts: Mapping[str, Tensor],
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

    `texts` maps a name to packed rows [rows, T] (integers, no padding); rows may differ in length between texts.
    `descriptions` gives the kind of each text, which is printed beside its name. Models stay on their device and in
    their dtype. `reporter` shows the progress.

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
        nll = {}
        for model, words, paths in ((teacher, "teacher", teacher_paths), (student, "student", student_paths)):
            with (reporter or Reporter.silent()).work(f"measuring {name}, {words}", rows.numel(), "tokens") as work:
                nll[words] = token_nll(model, rows, batch_size=batch_size, paths=paths, progress=work.at)
        difference = paired_bootstrap(nll["teacher"], nll["student"], level=level, resamples=resamples, seed=seed)
        description = (descriptions or {}).get(name, "")
        likelihood.append(_result(name, description, rows, nll["teacher"], nll["student"], difference))
    return Evaluation(
        teacher=teacher_name,
        student=student_name,
        level=level,
        resamples=resamples,
        seed=seed,
        likelihood=tuple(likelihood),
    )


def _result(
    name: str, description: str, rows: Tensor, teacher: Tensor, student: Tensor, difference: PairedDifference
) -> LikelihoodResult:
    return LikelihoodResult(
        text=name,
        description=description,
        rows=rows.shape[0],
        tokens=teacher.numel(),
        fingerprint=token_fingerprint(rows),
        teacher_nll=float(teacher.double().mean()),
        student_nll=float(student.double().mean()),
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        p_value=difference.p_value,
        by_position=_positions(teacher, student),
    )


def token_fingerprint(rows: Tensor) -> str:
    """Return a hash of these rows of tokens, 16 hexadecimal digits."""
    data = rows.to("cpu", torch.int64).contiguous()
    return hashlib.sha256(f"{list(data.shape)}".encode() + data.numpy().tobytes()).hexdigest()[:16]


def _positions(teacher: Tensor, student: Tensor) -> tuple[PositionResult, ...]:
    curves = zip(position_buckets(teacher.shape[1]), position_curve(teacher), position_curve(student), strict=True)
    return tuple(
        PositionResult(start=start, stop=stop, teacher_nll=first, student_nll=second)
        for (start, stop), first, second in curves
    )
