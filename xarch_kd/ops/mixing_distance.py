"""Distance between two token-mixing matrices of each head, row by row, without forming either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss
from xarch_kd.mixing import Mixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops import checks, panels, sketch
from xarch_kd.ops.dispatch import MixingImpl, choose
from xarch_kd.ops.mixing_inputs import MixingDistanceInputs, check_inputs
from xarch_kd.ops.reference.mixing_distance import row_distances
from xarch_kd.ops.row_distances import FORMULAS, MixingDistanceName
from xarch_kd.ops.streaming import mixing_distance as streaming
from xarch_kd.ops.streaming.autograd import Gradients, attach_gradients, recompute, stored, wanted
from xarch_kd.ops.tables import look_up


class MixingDistance(NamedTuple):
    """The reduced distance, and the standard error of its estimate: None unless `impl="sketch"`.

    `standard_error` has the shape of `total` and no gradient.

    >>> import torch
    >>> from xarch_kd import ops
    >>> ops.MixingDistance(torch.tensor(1.0), None).total
    tensor(1.)
    """

    total: Tensor
    standard_error: Tensor | None


def mixing_distance(
    student: Mixing,
    teacher: Mixing,
    *,
    distance: MixingDistanceName = "cosine",
    head_map: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: checks.Reduction | str = "mean",
    epsilon: float = 1e-8,
    impl: MixingImpl | str = "auto",
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
    it head h is compared with head h. A row is valid if it is in both mixings and in `mask` [batch, time], boolean.
    `reduction="mean"` is over valid rows × student heads, `"sum"` is 0 when none is valid, `"none"` gives [batch, time,
    student heads], 0 where a row is not valid. Gradients go to the student's factors alone; the teacher is detached.

    `impl="streaming"` holds `chunk_size` rows at a time, `"panels"` that many columns, `"sketch"` that many of its
    `probes`, random signs drawn with `seed`; their scalar values allow one backward. The sketch estimates frobenius,
    without bias, and returns its standard error.

    Raises:
        UsageError: mixings, head map, mask or options that do not fit, a mean over no rows, or a call in which only the
            teacher's side requires gradients.
        NonFiniteLoss: the distance of a valid row is NaN or infinite.

    Example:
        >>> import torch
        >>> from xarch_kd.mixing import SoftmaxMixing
        >>> from xarch_kd.ops import mixing_distance
        >>> query, key = torch.randn(1, 6, 2, 8, requires_grad=True), torch.randn(1, 6, 2, 8)
        >>> teacher = SoftmaxMixing(query=torch.randn(1, 6, 2, 4), key=torch.randn(1, 6, 2, 4), scale=0.5)
        >>> mixing_distance(SoftmaxMixing(query=query, key=key, scale=0.35), teacher).total.backward()
    """
    checks.check_reduction(reduction)
    checks.check_chunk_size(chunk_size)
    inputs = check_inputs(student, teacher, distance=distance, head_map=head_map, mask=mask, epsilon=epsilon)
    implementation = choose(
        "mixing_distance", impl, unsupported_reasons(student, teacher, distance=distance, head_map=head_map)
    )
    weights = _weights(inputs, reduction)
    standard_error = None
    if implementation == "reference":
        with torch.autocast(inputs.valid_mask.device.type, enabled=False):
            total = _reduce(row_distances(inputs), weights, reduction)
    elif implementation == "fused":
        from xarch_kd.ops.fused import mixing_distance as fused

        assert isinstance(student, SoftmaxMixing | SSDMixing) and isinstance(inputs.teacher, SoftmaxMixing)
        rows = fused.rows(student, inputs.teacher, inputs.formula, inputs.head_map, epsilon)
        total = _reduce(torch.where(inputs.valid_mask[:, :, None], rows, 0), weights, reduction)
    elif implementation == "sketch":
        signs = sketch.draw_signs(inputs, probes, seed)
        total, standard_error = sketch.estimate(inputs, signs, weights, reduction, chunk_size)
    else:
        total = _forward_backward(inputs, weights, reduction, implementation, chunk_size)
    _check_finite(total, distance)
    return MixingDistance(total, standard_error)


def unsupported_reasons(
    student: Mixing, teacher: Mixing, *, distance: MixingDistanceName = "cosine", head_map: Tensor | None = None
) -> Mapping[str, str]:
    """Return the reason for each implementation that cannot run on these inputs."""
    from xarch_kd.ops.fused import mixing_distance as fused

    formula = look_up("distance", distance, FORMULAS)
    found = {
        "fused": fused.unsupported_reason(student, teacher, formula, head_map),
        "streaming": streaming.unsupported_reason(student),
        "panels": panels.unsupported_reason(formula),
        "sketch": sketch.unsupported_reason(formula),
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _weights(inputs: MixingDistanceInputs, reduction: str) -> Tensor:
    """Return the weight of each row [batch, time, 1] in the total."""
    valid = inputs.valid_mask[:, :, None].to(inputs.dtype)
    if reduction != "mean":
        return valid
    count = inputs.valid_mask.sum()
    if not bool(count > 0):
        raise checks.refuse_mean_of_nothing()
    return valid / (count * inputs.student.heads)


def _reduce(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else (rows * weights).sum()


def _forward_backward(
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
