"""Distance between two token-mixing matrices of each head, row by row, without forming either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss
from xarch_kd.mixing import Mixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops import checks, panels, sketch
from xarch_kd.ops.dispatch import choose
from xarch_kd.ops.mixing_inputs import MixingDistanceInputs, check_inputs
from xarch_kd.ops.reference.mixing_distance import row_distances
from xarch_kd.ops.streaming import mixing_distance as streaming
from xarch_kd.ops.streaming.autograd import Gradients, attach_gradients, recompute, stored, wanted


class MixingDistance(NamedTuple):
    """The reduced distance, and how far the estimate may be off: None unless `impl="sketch"`.

    `standard_error` has the shape of `total` and no gradient.
    """

    total: Tensor
    standard_error: Tensor | None


def mixing_distance(
    teacher: Mixing,
    student: Mixing,
    *,
    distance: str = "cosine",
    head_map: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    epsilon: float = 1e-8,
    impl: str = "auto",
    chunk_size: int | None = None,
    probes: int = 64,
    seed: int | torch.Generator | None = None,
) -> MixingDistance:
    """Return the distance of the student's mixing M from the teacher's, P = head_map @ teacher.

    Of each row i: `cosine`, 1 - <P_i, M_i> / (|P_i| |M_i|), epsilon under both roots; `frobenius`, |P_i - M_i|²
    (MOHAWK's, arXiv:2408.10189); `relative_frobenius`, that over |P_i|² + epsilon; for two softmaxes also `kl`,
    Σ_j P_ij log(P_ij / M_ij) in nats, and `cross_entropy`, -Σ_j P_ij log M_ij. Only cosine and kl do not grow with the
    scale of M, which a state-space student is free in.

    `head_map` [student heads, teacher heads] is not negative, has no zero row, and for kl rows that sum to 1; without
    it head h is compared with head h. A row counts when it does in both mixings and in `mask` [batch, time], boolean.
    `reduction="mean"` is over rows that count × student heads, `"sum"` is 0 when none counts, `"none"` gives [batch,
    time, student heads], 0 where a row does not count. Gradients go to the student's factors alone.

    `impl="streaming"` holds `chunk_size` rows at a time, `"panels"` that many columns, `"sketch"` that many of its
    `probes`, random signs drawn with `seed`; their scalar values allow one backward. The sketch estimates frobenius,
    without bias, and says its standard error.

    Raises:
        UsageError: mixings, head map, mask or options that do not fit, or a mean over no rows.
        NonFiniteLoss: the distance of a counted row is NaN or infinite.
    """
    checks.check_reduction(reduction)
    checks.check_chunk_size(chunk_size)
    inputs = check_inputs(teacher, student, distance=distance, head_map=head_map, mask=mask, epsilon=epsilon)
    implementation = choose(
        "mixing_distance", impl, unsupported_reasons(teacher, student, distance=distance, head_map=head_map)
    )
    weights = _weights(inputs, reduction)
    standard_error = None
    if implementation == "reference":
        with torch.autocast(inputs.keep.device.type, enabled=False):
            total = _reduce(row_distances(inputs), weights, reduction)
    elif implementation == "fused":
        from xarch_kd.ops.fused import mixing_distance as fused

        assert isinstance(inputs.teacher, SoftmaxMixing) and isinstance(student, SoftmaxMixing | SSDMixing)
        rows = fused.rows(inputs.teacher, student, distance, inputs.head_map, epsilon)
        total = _reduce(torch.where(inputs.keep[:, :, None], rows, 0), weights, reduction)
    elif implementation == "sketch":
        signs = sketch.draw_signs(inputs, probes, seed)
        total, standard_error = sketch.estimate(inputs, signs, weights, reduction, chunk_size)
    else:
        total = _swept(inputs, weights, reduction, implementation, chunk_size)
    _check_finite(total, distance)
    return MixingDistance(total, standard_error)


def unsupported_reasons(
    teacher: Mixing, student: Mixing, *, distance: str = "cosine", head_map: Tensor | None = None
) -> Mapping[str, str]:
    """Return for each implementation that cannot run on these inputs the reason."""
    from xarch_kd.ops.fused import mixing_distance as fused

    found = {
        "fused": fused.unsupported_reason(teacher, student, distance, head_map),
        "streaming": streaming.unsupported_reason(student),
        "panels": panels.unsupported_reason(distance),
        "sketch": sketch.unsupported_reason(distance),
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _weights(inputs: MixingDistanceInputs, reduction: str) -> Tensor:
    """Return what each row [batch, time, 1] is multiplied by in the total."""
    kept = inputs.keep[:, :, None].to(inputs.dtype)
    if reduction != "mean":
        return kept
    count = inputs.keep.sum()
    if not bool(count > 0):
        raise checks.refuse_mean_of_nothing()
    return kept / (count * inputs.student.heads)


def _reduce(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else (rows * weights).sum()


def _swept(
    inputs: MixingDistanceInputs, weights: Tensor, reduction: str, implementation: str, chunk_size: int | None
) -> Tensor:
    """Return the total of an implementation that makes the gradients itself, with them attached."""
    forward_backward = {"streaming": streaming.forward_backward, "panels": panels.forward_backward}[implementation]
    names, factors = zip(*inputs.student.factors.items(), strict=True)
    needs = frozenset(name for name, need in zip(names, wanted(*factors), strict=True) if need)
    now = needs if reduction != "none" else frozenset[str]()
    result = forward_backward(inputs, weights, now, chunk_size)
    total = _reduce(result.values, weights, reduction)
    if not needs:
        return total

    def gradients(found: Mapping[str, Tensor]) -> Gradients:
        return [stored(found.get(name), factor) for name, factor in zip(names, factors, strict=True)]

    if reduction != "none":
        return attach_gradients(total, factors, gradients(result.gradients))
    return recompute(
        total, factors, lambda up: gradients(forward_backward(inputs, up * weights, needs, chunk_size).gradients)
    )


def _check_finite(total: Tensor, distance: str) -> None:
    checks.require(
        checks.all_finite(total),
        lambda: NonFiniteLoss(
            f"The distance '{distance}' is not finite.",
            found="a NaN or infinite value in the factors of a mixing, or entries too large",
            allowed="finite factors at every token that counts",
        ),
    )
