"""Divergence between a student's next-token distributions and a teacher's, and the labels' cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import checks
from xarch_kd.ops.dispatch import Impl, choose
from xarch_kd.ops.divergence_inputs import DivergenceInputs, check_inputs, pick, spread
from xarch_kd.ops.divergences import Divergence, DivergenceFormula, DivergenceKind, as_divergence
from xarch_kd.ops.fused import linear_divergence as fused
from xarch_kd.ops.heads import Head, HeadInputs, as_head
from xarch_kd.ops.reference.linear_divergence import token_values
from xarch_kd.ops.streaming.autograd import Gradients, attach_gradients, recompute, stored, wanted
from xarch_kd.ops.streaming.linear_divergence import ForwardBackward, forward_backward
from xarch_kd.ops.teacher import TeacherLogits, TeacherTopK


class DivergenceLoss(NamedTuple):
    """Loss and its parts. Only `total` has a gradient: the parts share one gradient buffer.

    `divergence` and `cross_entropy` are unweighted, in nats, reduced like `total`; `cross_entropy` is None without
    labels.

    >>> import torch
    >>> from xarch_kd import ops
    >>> ops.DivergenceLoss(torch.tensor(1.0), torch.tensor(1.0), None).total
    tensor(1.)
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None


def linear_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher: Tensor | TeacherLogits | TeacherTopK,
    teacher_head: Head | Tensor | None = None,
    *,
    divergence: DivergenceKind | Mapping[str, Any] | Divergence | DivergenceFormula = "forward_kl",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    divergence_weight: float = 1.0,
    cross_entropy: float = 0.0,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    vocabulary: int | None = None,
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    reduction: checks.Reduction | str = "mean",
    impl: Impl | str = "auto",
    chunk_size: int | None = None,
) -> DivergenceLoss:
    """Return divergence_weight * D(p, q) + cross_entropy * CE(labels, q) over the valid tokens.

    p = softmax(teacher logits / temperature) and q likewise. The divergence is the plain one at that temperature: a
    factor T² belongs into `divergence_weight`. Cross-entropy is taken at temperature 1.

    The teacher is given in one of three forms: hidden states with `teacher_head`; `TeacherLogits`, as they come out of
    its model; or `TeacherTopK`, its likeliest entries at `temperature`, in which case D is the divergence between
    buckets that `TeacherTopK` describes. A head is a `Head` or, without bias, scale and softcap, its weight.

    Hidden states are [tokens, dim] or [batch, time, dim], weights [vocabulary, dim]; `labels` (already shifted: the
    token that follows that position, -100 to ignore the position), `mask` (boolean) and `token_weights` (>= 0) have
    the leading axes of the hidden states. A token is valid when its mask is true, its label is not ignored and its
    weight is not 0. `vocabulary` is the number of leading entries that mean the same in both models, by default all
    that both have if their sizes differ by no more than padding does; the rest is excluded from both distributions.

    `logits_dtype` is the dtype of hidden weightᵀ and of its gradient; what follows the product is computed in float32.
    `"auto"` is `"float32"`, which float64 inputs widen to float64. `"bfloat16"` multiplies in bfloat16, with half the
    memory of the logits, and drowns small differences: with logits of standard deviation 3 the gradient of the hidden
    states is off by 0.9 % at a forward KL of 7, 6 % at 0.04 and 64 to 72 % at 4e-4 (where the value, too, is off by 26
    to 64 %), against 0.3 % at each for float32 logits whose gradient is rounded to bfloat16. Use it for students that
    are far from their teacher.

    `reduction="mean"` divides by the sum of the weights of the valid tokens; `"sum"` does not, and is 0 when no token
    is valid; `"none"` gives one weighted value per token, 0 where it is not valid. Gradients go to the student's hidden
    states, weight and bias; the teacher is detached. `chunk_size` is the number of tokens held as logits at a time by
    `impl="streaming"`, whose values allow one backward.

    Raises:
        UsageError: shapes, dtypes, devices or options that do not fit, a mean over no tokens, or a call in which only
            the teacher's side requires gradients.
        NonFiniteLoss: the divergence or cross-entropy of a valid token is NaN or infinite.

    Warns:
        UserWarning: more than half of the tokens are far from the teacher and have no gradient (JSD, skew KL and total
            variation saturate); counted by `impl="streaming"` and `"fused"`.

    Example:
        >>> import torch
        >>> from xarch_kd.ops import linear_divergence
        >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(32, 8)
        >>> loss = linear_divergence(hidden, head, torch.randn(2, 5, 16), torch.randn(32, 16), divergence="reverse_kl")
        >>> loss.total.backward()
    """
    checks.check_reduction(reduction)
    checks.check_chunk_size(chunk_size)
    inputs = check_inputs(
        HeadInputs(student_hidden, as_head(student_head)),
        _teacher(teacher, teacher_head),
        divergence=as_divergence(divergence),
        temperature=temperature,
        divergence_weight=divergence_weight,
        cross_entropy=cross_entropy,
        labels=labels,
        mask=mask,
        token_weights=token_weights,
        vocabulary=vocabulary,
        logits_dtype=logits_dtype,
    )
    unsupported_reason = fused.unsupported_reason(inputs)
    implementation = choose(
        "linear_divergence", impl, {} if unsupported_reason is None else {"fused": unsupported_reason}
    )
    if reduction == "mean" and inputs.tokens == 0:
        raise checks.refuse_mean_of_nothing()
    if implementation == "reference":
        with torch.autocast(student_hidden.device.type, enabled=False):
            rows, cross = token_values(inputs)
        total = _reduce(_weighted_sum(inputs, rows, cross), inputs, reduction)
    else:
        run = fused.forward_backward if implementation == "fused" else forward_backward
        total, rows, cross = _forward_backward(run, inputs, reduction, chunk_size)
    parts = [None if part is None else _reduce(part.detach(), inputs, reduction) for part in (rows, cross)]
    _check_finite(parts[0], parts[1])
    assert parts[0] is not None
    return DivergenceLoss(total, parts[0], parts[1])


def _teacher(
    teacher: Tensor | TeacherLogits | TeacherTopK, head: Head | Tensor | None
) -> HeadInputs | TeacherLogits | TeacherTopK:
    """Return the teacher in the one form in which it is given."""
    if not isinstance(teacher, Tensor | TeacherLogits | TeacherTopK):
        raise UsageError(
            "The teacher is in no known form.",
            found=type(teacher).__name__,
            allowed="hidden states with teacher_head | TeacherLogits | TeacherTopK",
        )
    if isinstance(teacher, Tensor):
        if head is None:
            raise UsageError(
                "teacher_head is missing.",
                found="a teacher given as a tensor, its hidden states, without a head",
                allowed="hidden states with teacher_head | TeacherLogits | TeacherTopK",
                fix="pass teacher_head=, or TeacherLogits(tensor) if it holds logits",
            )
        return HeadInputs(teacher, as_head(head))
    if head is not None:
        raise UsageError(
            f"A teacher given as {type(teacher).__name__} takes no teacher_head.",
            allowed="a head only with hidden states",
            fix="apply weight, bias, scale and softcap to the logits",
        )
    return teacher


def _forward_backward(
    run: Callable[[DivergenceInputs, Tensor, tuple[bool, ...], int | None], ForwardBackward],
    inputs: DivergenceInputs,
    reduction: str,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the total, with its gradients attached, and the unweighted values of each valid token."""
    student = inputs.student
    trained = (student.hidden, student.head.weight, student.head.bias)
    needs = wanted(*trained)
    now = needs if reduction != "none" else (False, False, False)
    scale = inputs.weights if reduction == "sum" else inputs.weights / inputs.weights.sum()
    result = run(inputs, scale, now, chunk_size)
    _warn_saturated(inputs, result)
    total = _reduce(_weighted_sum(inputs, result.divergence, result.cross_entropy), inputs, reduction)
    if reduction == "none" and any(needs):

        def backward(upstream: Tensor) -> Gradients:
            picked = pick(upstream.reshape(-1), inputs.valid_indices)
            return _gradients(run(inputs, picked * inputs.weights, needs, chunk_size), inputs)

        total = recompute(total, trained, backward)
    elif any(needs):
        total = attach_gradients(total, trained, _gradients(result, inputs))
    return total, result.divergence, result.cross_entropy


def _warn_saturated(inputs: DivergenceInputs, result: ForwardBackward) -> None:
    saturated = result.saturated
    if saturated is None:
        return
    checks.warn_unless(
        torch.as_tensor(2 * saturated <= inputs.tokens),
        lambda: (
            f"{inputs.divergence.name} is saturated: {int(saturated)} of {inputs.tokens} tokens are far from "
            "the teacher and have almost no gradient. Start with forward_kl, or raise the temperature."
        ),
        # The caller of `linear_divergence`.
        stacklevel=5,
    )


def _gradients(result: ForwardBackward, inputs: DivergenceInputs) -> Gradients:
    student = inputs.student
    head = student.head
    pairs = ((result.hidden, student.hidden), (result.weight, head.weight), (result.bias, head.bias))
    return [stored(gradient, like) for gradient, like in pairs]


def _weighted_sum(inputs: DivergenceInputs, divergence: Tensor, cross_entropy: Tensor | None) -> Tensor:
    rows = inputs.divergence_weight * divergence
    return rows if cross_entropy is None else rows + inputs.cross_entropy_weight * cross_entropy


def _reduce(rows: Tensor, inputs: DivergenceInputs, reduction: str) -> Tensor:
    rows = rows * inputs.weights
    if reduction == "none":
        return spread(rows, inputs.valid_indices, inputs.shape)
    return rows.sum() if reduction == "sum" else rows.sum() / inputs.weights.sum()


def _check_finite(divergence: Tensor | None, cross_entropy: Tensor | None) -> None:
    for name, part in (("divergence", divergence), ("cross-entropy", cross_entropy)):
        if part is not None:
            checks.require(checks.all_finite(part), partial(_not_finite, name))


def _not_finite(name: str) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"The {name} is not finite.",
        found="a NaN or infinite value in the hidden states or heads, or logits too far apart",
        allowed="finite logits at every token that counts",
    )
