"""The checked, flattened inputs of `linear_divergence`, as every implementation takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.ops import checks
from xarch_kd.ops.divergences import Divergence
from xarch_kd.ops.heads import HeadInputs
from xarch_kd.ops.teacher import Buckets, TeacherLogits, TeacherTopK, check_logits, read_top_k

IGNORED_LABEL = -100
LOGITS_DTYPES = ("auto", "float32", "bfloat16")
# Heads are padded to a multiple of at most this many rows; sizes further apart are different vocabularies.
MOST_PADDING = 1024


@dataclass(frozen=True, kw_only=True)
class DivergenceInputs:
    """`linear_divergence` with every argument checked and the leading axes `shape` flattened to tokens.

    `teacher` is hidden states and a head, logits of every token, or the `Buckets` of the valid tokens.

    `valid_indices` [k] are the indices of the valid tokens (None: all); `weights` [k] multiply their rows; `labels`
    [k]. `dtype` is what values and everything a row needs are computed in; `logits_dtype`, equal to it or bfloat16, is
    what the products of hidden states and heads, and the gradient that goes back through them, are rounded to.
    """

    student: HeadInputs
    teacher: HeadInputs | TeacherLogits | Buckets
    divergence: Divergence
    temperature: float
    divergence_weight: float
    cross_entropy_weight: float
    vocabulary: int
    labels: Tensor | None
    valid_indices: Tensor | None
    weights: Tensor
    shape: torch.Size
    dtype: torch.dtype
    logits_dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Number of valid tokens."""
        return self.weights.shape[0]


def check_head(name: str, model: HeadInputs) -> None:
    """Raise UsageError unless hidden states and head of the model `name` fit each other."""
    hidden, head = model.hidden, model.head
    checks.check_floating(**{f"{name}_hidden": hidden, f"{name}_head.weight": head.weight})
    checks.check_floating(**{f"{name}_head.bias": head.bias})
    if hidden.dim() not in (2, 3):
        raise UsageError(
            f"{name}_hidden does not fit.", found=list(hidden.shape), allowed="[tokens, dim] or [batch, time, dim]"
        )
    if head.weight.dim() != 2:
        raise UsageError(f"{name}_head does not fit.", found=list(head.weight.shape), allowed="[vocabulary, dim]")
    rows = head.weight.shape[0]
    meaning = f"[vocabulary, dim of {name}_hidden]"
    checks.check_shape(f"{name}_head.weight", head.weight, (rows, hidden.shape[-1]), meaning)
    checks.check_shape(f"{name}_head.bias", head.bias, (rows,), f"[rows of {name}_head.weight]")
    if head.bias is not None:
        checks.require(
            checks.all_finite(head.bias),
            lambda: UsageError(
                f"{name}_head.bias must be finite.",
                found="an infinite or NaN entry",
                fix="exclude padded entries of the vocabulary with vocabulary=",
            ),
        )
    if head.softcap is not None and not head.softcap > 0:
        raise UsageError(
            f"{name}_head.softcap must be positive.", found=head.softcap, allowed="> 0, or None for no softcap"
        )
    if not math.isfinite(head.scale):
        raise UsageError(f"{name}_head.scale must be finite.", found=head.scale)


def shared_vocabulary(student_rows: int, teacher_rows: int, vocabulary: int | None) -> int:
    """Return the number of vocabulary entries that are compared: as asked, else all that both models have."""
    shared = min(student_rows, teacher_rows)
    if vocabulary is None and max(student_rows, teacher_rows) - shared > MOST_PADDING:
        raise UsageError(
            "The vocabularies differ by more than padding.",
            found=f"{student_rows} student rows and {teacher_rows} teacher rows",
            allowed=f"a difference of at most {MOST_PADDING}",
            fix="if the first entries mean the same tokens in both models, pass their number as vocabulary=",
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
    """Return the dtype of the logits when values are computed in `dtype`: the same, or bfloat16 if asked.

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
            allowed=f"0 to {vocabulary - 1}, or {IGNORED_LABEL} to ignore the token",
        ),
    )


def token_mask(labels: Tensor | None, mask: Tensor | None, token_weights: Tensor | None) -> Tensor | None:
    """Return a boolean of the leading axes, true at valid tokens, or None if nothing excludes any.

    A token is valid when the mask is true there, its label is not ignored and its weight is not 0.
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
    valid = parts[0]
    for part in parts[1:]:
        valid = valid & part
    return valid


def check_inputs(
    student: HeadInputs,
    teacher: HeadInputs | TeacherLogits | TeacherTopK,
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
    """Check everything and return it with the leading axes of hidden states and teacher flattened.

    Raises UsageError for arguments that do not fit, or sides that are swapped.
    """
    check_head("student", student)
    check_scalars(temperature, divergence_weight, cross_entropy, labels)
    leading = student.hidden.shape[:-1]
    for name, tensor in (("labels", labels), ("mask", mask), ("token_weights", token_weights)):
        checks.check_shape(name, tensor, tuple(leading), "[leading axes of student_hidden]")
    checks.check_mask(mask)
    checks.check_floating(token_weights=token_weights)
    head = student.head
    own = {"student_hidden": student.hidden, "student_head.weight": head.weight, "student_head.bias": head.bias}
    given = _teacher_tensors(teacher, leading)
    # A head that trains does not show that the hidden states of the two models are not swapped.
    checks.refuse_swapped_sides((student.hidden,), list(given.values())[:1])
    checks.refuse_swapped_sides(own.values(), given.values())
    indices = teacher.indices if isinstance(teacher, TeacherTopK) else None
    checks.check_device(**own, **given, indices=indices, labels=labels, mask=mask, token_weights=token_weights)
    shared = shared_vocabulary(head.weight.shape[0], _rows(student, teacher), vocabulary)
    if labels is not None:
        check_labels(labels, shared)
    device, count = student.hidden.device, math.prod(leading)
    dtype = checks.accumulation_dtype(*own.values(), *given.values())
    alone = labels if mask is None and token_weights is None else None
    valid = token_mask(labels, mask, token_weights)
    valid_indices = checks.valid_token_indices(count, valid, device, of=alone)
    return DivergenceInputs(
        student=_flat(student),
        teacher=_read_teacher(teacher, leading, valid_indices, shared),
        divergence=divergence.limit(),
        temperature=temperature,
        divergence_weight=divergence_weight,
        cross_entropy_weight=cross_entropy,
        vocabulary=shared,
        # A label out of range is refused when its check is settled, which may be after it was used as an index.
        labels=None if labels is None else pick(labels.reshape(-1).long(), valid_indices).clamp(0, shared - 1),
        valid_indices=valid_indices,
        weights=_weights(token_weights, valid_indices, count, dtype, device),
        shape=leading,
        dtype=dtype,
        logits_dtype=resolve_logits_dtype(logits_dtype, dtype),
    )


def _teacher_tensors(
    teacher: HeadInputs | TeacherLogits | TeacherTopK, leading: torch.Size
) -> dict[str, Tensor | None]:
    """Return the teacher's floating-point tensors by name, what depends on the tokens first.

    They are checked for all that does not depend on the vocabulary.
    """
    if isinstance(teacher, TeacherTopK):
        return {"teacher.log_probabilities": teacher.log_probabilities}
    if isinstance(teacher, TeacherLogits):
        check_logits(teacher.values, leading)
        return {"teacher.values": teacher.values}
    check_head("teacher", teacher)
    expected = (*leading, teacher.hidden.shape[-1])
    checks.check_shape("teacher", teacher.hidden, expected, "[axes of student_hidden, teacher dim]")
    head = teacher.head
    return {"teacher": teacher.hidden, "teacher_head.weight": head.weight, "teacher_head.bias": head.bias}


def _rows(student: HeadInputs, teacher: HeadInputs | TeacherLogits | TeacherTopK) -> int:
    """Return the number of vocabulary entries of the teacher; a top-k has those of the student."""
    if isinstance(teacher, HeadInputs):
        return teacher.head.weight.shape[0]
    return teacher.values.shape[-1] if isinstance(teacher, TeacherLogits) else student.head.weight.shape[0]


def _read_teacher(
    teacher: HeadInputs | TeacherLogits | TeacherTopK,
    leading: torch.Size,
    valid_indices: Tensor | None,
    vocabulary: int,
) -> HeadInputs | TeacherLogits | Buckets:
    if isinstance(teacher, HeadInputs):
        return _flat(teacher).detach()
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.values.detach().reshape(-1, teacher.values.shape[-1]))
    return read_top_k(teacher, leading, valid_indices, vocabulary)


def _flat(model: HeadInputs) -> HeadInputs:
    return HeadInputs(model.hidden.reshape(-1, model.hidden.shape[-1]), model.head)


def _weights(
    token_weights: Tensor | None, valid_indices: Tensor | None, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if token_weights is None:
        return torch.ones(count if valid_indices is None else valid_indices.shape[0], dtype=dtype, device=device)
    return pick(token_weights.detach().reshape(-1).to(dtype), valid_indices)


def pick(values: Tensor, valid_indices: Tensor | None) -> Tensor:
    """Return the rows of `values` at `valid_indices`, or all of them."""
    return values if valid_indices is None else values.index_select(0, valid_indices)


def spread(rows: Tensor, valid_indices: Tensor | None, shape: torch.Size) -> Tensor:
    """Return per-token values [k] in the leading axes `shape`, 0 where a token is not valid."""
    if valid_indices is None:
        return rows.reshape(shape)
    return rows.new_zeros(math.prod(shape)).index_copy(0, valid_indices, rows).reshape(shape)
