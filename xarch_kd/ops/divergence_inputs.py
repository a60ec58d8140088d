"""The checked, flattened inputs of `linear_divergence`, as every implementation takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.ops import checks
from xarch_kd.ops.divergences import Divergence
from xarch_kd.ops.teacher import Buckets, Logits, TeacherTopK, check_logits, read_top_k

IGNORED_LABEL = -100
LOGITS_DTYPES = ("auto", "float32", "bfloat16")
# Heads are padded to a multiple of at most this many rows; sizes further apart are different vocabularies.
MOST_PADDING = 1024


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's hidden states [tokens, width] and head: softcap(scale * (hidden weightᵀ + bias)).

    `weight` is [rows, width] and `bias` [rows]; rows past the shared vocabulary are padding. `softcap` c is
    z ← c tanh(z / c).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class DivergenceInputs:
    """`linear_divergence` with every argument checked and the leading axes of length `shape` flattened to tokens.

    `teacher` is a head, logits of every token, or the `Buckets` of the tokens that count.

    `kept` [k] are the indices of the tokens that count (None: all); `weights` [k] multiply their rows; `labels` [k].
    `dtype` is what values and everything a row needs are computed in; `logits_dtype`, equal to it or bfloat16, is what
    the products of hidden states and heads, and the gradient that goes back through them, are rounded to.
    """

    student: Side
    teacher: Side | Logits | Buckets
    divergence: Divergence
    temperature: float
    divergence_weight: float
    cross_entropy_weight: float
    vocabulary: int
    labels: Tensor | None
    kept: Tensor | None
    weights: Tensor
    shape: torch.Size
    dtype: torch.dtype
    logits_dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return self.weights.shape[0]


def check_side(name: str, hidden: Tensor, side: Side) -> None:
    """Raise UsageError unless hidden states and head of one model fit each other."""
    checks.check_floating(**{f"{name}_hidden": hidden, f"{name}_weight": side.weight, f"{name}_bias": side.bias})
    if hidden.dim() not in (2, 3):
        raise UsageError(
            f"{name}_hidden does not fit.", found=list(hidden.shape), allowed="[tokens, width] or [batch, time, width]"
        )
    if side.weight.dim() != 2:
        raise UsageError(f"{name}_weight does not fit.", found=list(side.weight.shape), allowed="[vocabulary, width]")
    rows = side.weight.shape[0]
    checks.check_shape(f"{name}_weight", side.weight, (rows, hidden.shape[-1]), f"[vocabulary, width of {name}_hidden]")
    checks.check_shape(f"{name}_bias", side.bias, (rows,), f"[rows of {name}_weight]")
    if side.bias is not None:
        checks.require(
            checks.all_finite(side.bias),
            lambda: UsageError(
                f"{name}_bias must be finite.",
                found="an infinite or NaN entry",
                fix="leave padded entries of the vocabulary out with vocabulary=",
            ),
        )
    if side.softcap is not None and not side.softcap > 0:
        raise UsageError(f"{name}_softcap must be positive.", found=side.softcap, allowed="> 0, or None for no softcap")
    if not math.isfinite(side.scale):
        raise UsageError(f"{name}_scale must be finite.", found=side.scale)


def shared_vocabulary(student_rows: int, teacher_rows: int, vocabulary: int | None) -> int:
    """Return the number of vocabulary entries that are compared: as asked, else all that both models have."""
    shared = min(student_rows, teacher_rows)
    if vocabulary is None and max(student_rows, teacher_rows) - shared > MOST_PADDING:
        raise UsageError(
            "The vocabularies differ by more than padding.",
            found=f"{student_rows} student rows and {teacher_rows} teacher rows",
            allowed=f"a difference of at most {MOST_PADDING}",
            fix="if the first entries mean the same tokens in both models, say how many with vocabulary=",
        )
    if vocabulary is None:
        return shared
    if not 1 <= vocabulary <= shared:
        raise UsageError(
            "vocabulary is more than both models have.",
            asked=vocabulary,
            found=f"{student_rows} student rows and {teacher_rows} teacher rows",
            allowed=f"1 to {shared}",
        )
    return vocabulary


def check_scalars(temperature: float, divergence_weight: float, cross_entropy: float, labels: Tensor | None) -> None:
    """Raise UsageError unless temperature is positive, weights are non-negative and cross-entropy has its labels."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError("temperature must be positive.", found=temperature, allowed="> 0")
    for name, value in (("divergence_weight", divergence_weight), ("cross_entropy", cross_entropy)):
        if not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"{name} must not be negative.", found=value, allowed=">= 0")
    if cross_entropy > 0 and labels is None:
        raise UsageError("cross_entropy needs labels.", asked=f"cross_entropy={cross_entropy}", found="labels=None")


def resolve_logits_dtype(asked: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits when values are computed in `dtype`: the same, or bfloat16 where it is asked for.

    `float32` means at least float32: float64 inputs keep float64 logits.
    """
    if asked not in LOGITS_DTYPES:
        raise UsageError(
            f"There is no such logits_dtype.{suggest(str(asked), LOGITS_DTYPES)}",
            asked=asked,
            allowed=" | ".join(LOGITS_DTYPES),
        )
    if asked != "bfloat16":
        return dtype
    if dtype == torch.float64:
        raise UsageError(
            "float64 inputs keep float64 logits.", asked="logits_dtype='bfloat16'", allowed="logits_dtype='auto'"
        )
    return torch.bfloat16


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise UsageError unless every label is an entry of the shared vocabulary or the ignored label."""
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise UsageError("labels must be integers.", found=labels.dtype, allowed="an integer dtype")
    wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocabulary))
    checks.require(
        ~wrong.any(),
        lambda: UsageError(
            "A label is outside the vocabulary that is compared.",
            found=int(labels[wrong][0]),
            allowed=f"0 to {vocabulary - 1}, or {IGNORED_LABEL} to leave the token out",
        ),
    )


def token_keep(labels: Tensor | None, mask: Tensor | None, token_weights: Tensor | None) -> Tensor | None:
    """Return a boolean of the leading axes, true where a token counts, or None when nothing leaves tokens out.

    A token counts when the mask is true there, its label is not ignored and its weight is not 0.
    """
    if token_weights is not None:
        checks.require(
            ((token_weights >= 0) & ~torch.isinf(token_weights)).all(),
            lambda: UsageError("token_weights must be finite and not negative.", allowed=">= 0"),
        )
    parts = [] if mask is None else [mask]
    if labels is not None:
        parts.append(labels != IGNORED_LABEL)
    if token_weights is not None:
        parts.append(token_weights > 0)
    if not parts:
        return None
    keep = parts[0]
    for part in parts[1:]:
        keep = keep & part
    return keep


def check_inputs(
    student: Side,
    teacher: Side | Tensor | TeacherTopK,
    *,
    divergence: Divergence,
    temperature: float,
    divergence_weight: float,
    cross_entropy: float,
    labels: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    vocabulary: int | None,
    logits_dtype: str = "auto",
) -> DivergenceInputs:
    """Check everything and return the problem; hidden states, or a teacher's logits, may have their leading axes."""
    check_side("student", student.hidden, student)
    check_scalars(temperature, divergence_weight, cross_entropy, labels)
    leading = student.hidden.shape[:-1]
    for name, tensor in (("labels", labels), ("mask", mask), ("token_weights", token_weights)):
        checks.check_shape(name, tensor, tuple(leading), "[leading axes of student_hidden]")
    checks.check_mask(mask)
    checks.check_floating(token_weights=token_weights)
    given = {"student_hidden": student.hidden, "student_weight": student.weight, "student_bias": student.bias}
    given |= _teacher_tensors(teacher, leading)
    indices = teacher.indices if isinstance(teacher, TeacherTopK) else None
    checks.check_device(**given, indices=indices, labels=labels, mask=mask, token_weights=token_weights)
    shared = shared_vocabulary(student.weight.shape[0], _rows(teacher, student), vocabulary)
    if labels is not None:
        check_labels(labels, shared)
    device, count, dtype = student.hidden.device, math.prod(leading), checks.accumulation_dtype(*given.values())
    alone = labels if mask is None and token_weights is None else None
    kept = checks.counted_tokens(count, token_keep(labels, mask, token_weights), device, of=alone)
    return DivergenceInputs(
        student=_flat(student),
        teacher=_read_teacher(teacher, leading, kept, shared),
        divergence=divergence.limit(),
        temperature=temperature,
        divergence_weight=divergence_weight,
        cross_entropy_weight=cross_entropy,
        vocabulary=shared,
        # A label out of range is refused when its check is settled, which may be after it was used as an index.
        labels=None if labels is None else pick(labels.reshape(-1).long(), kept).clamp(0, shared - 1),
        kept=kept,
        weights=_weights(token_weights, kept, count, dtype, device),
        shape=leading,
        dtype=dtype,
        logits_dtype=resolve_logits_dtype(logits_dtype, dtype),
    )


def _teacher_tensors(teacher: Side | Tensor | TeacherTopK, leading: torch.Size) -> dict[str, Tensor | None]:
    """Return the teacher's floating-point tensors by name, after a check of what does not depend on the vocabulary."""
    if isinstance(teacher, TeacherTopK):
        return {"teacher_top_k": teacher.log_probabilities}
    if isinstance(teacher, Tensor):
        check_logits(teacher, leading)
        return {"teacher_logits": teacher}
    check_side("teacher", teacher.hidden, teacher)
    expected = (*leading, teacher.hidden.shape[-1])
    checks.check_shape("teacher_hidden", teacher.hidden, expected, "[axes of student_hidden, teacher width]")
    return {"teacher_hidden": teacher.hidden, "teacher_weight": teacher.weight, "teacher_bias": teacher.bias}


def _rows(teacher: Side | Tensor | TeacherTopK, student: Side) -> int:
    """Return how many vocabulary entries the teacher has; a top-k has those of the student."""
    if isinstance(teacher, Side):
        return teacher.weight.shape[0]
    return teacher.shape[-1] if isinstance(teacher, Tensor) else student.weight.shape[0]


def _read_teacher(
    teacher: Side | Tensor | TeacherTopK, leading: torch.Size, kept: Tensor | None, vocabulary: int
) -> Side | Logits | Buckets:
    if isinstance(teacher, Side):
        return _flat(teacher)
    if isinstance(teacher, Tensor):
        return Logits(values=teacher.detach().reshape(-1, teacher.shape[-1]))
    return read_top_k(teacher, leading, kept, vocabulary)


def _flat(side: Side) -> Side:
    return replace(side, hidden=side.hidden.reshape(-1, side.hidden.shape[-1]))


def _weights(
    token_weights: Tensor | None, kept: Tensor | None, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if token_weights is None:
        return torch.ones(count if kept is None else kept.shape[0], dtype=dtype, device=device)
    return pick(token_weights.detach().reshape(-1).to(dtype), kept)


def pick(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return the rows of `values` that `kept` names, or all of them."""
    return values if kept is None else values.index_select(0, kept)


def spread(rows: Tensor, kept: Tensor | None, shape: torch.Size) -> Tensor:
    """Return per-token values [k] in the leading axes `shape`, 0 where a token does not count."""
    if kept is None:
        return rows.reshape(shape)
    return rows.new_zeros(math.prod(shape)).index_copy(0, kept, rows).reshape(shape)
