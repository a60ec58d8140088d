"""Distance between a student's features, through a linear projector, and a teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import checks
from xarch_kd.ops.dispatch import Impl, choose
from xarch_kd.ops.divergence_inputs import pick, spread
from xarch_kd.ops.feature_distances import FeatureDistanceFormula, FeatureDistanceName
from xarch_kd.ops.fused import projected_distance as fused
from xarch_kd.ops.projected_inputs import ProjectedDistanceInputs, check_inputs, energy, read_distance
from xarch_kd.ops.reference.projected_distance import token_values
from xarch_kd.ops.streaming.autograd import Gradients, attach_gradients, recompute, stored, wanted
from xarch_kd.ops.streaming.projected_distance import ForwardBackward, default_chunk, forward_backward


class ProjectedDistance(NamedTuple):
    """The reduced distance, and the scalar that the sum over tokens was divided by to get it.

    `normalizer` is the number of valid tokens of a mean, Σ|teacher|² of `relative_mse`, and 1 of a sum or of values per
    token. It has no gradient.

    >>> import torch
    >>> from xarch_kd import ops
    >>> ops.ProjectedDistance(torch.tensor(1.0), torch.tensor(8.0)).normalizer
    tensor(8.)
    """

    total: Tensor
    normalizer: Tensor


def projected_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    distance: FeatureDistanceName | FeatureDistanceFormula = "normalised_mse",
    mask: Tensor | None = None,
    reduction: checks.Reduction | str = "mean",
    epsilon: float = 1e-6,
    delta: float = 1.0,
    impl: Impl | str = "auto",
    chunk_size: int | None = None,
) -> ProjectedDistance:
    """Return the distance of y = student weightᵀ + bias (or of the student itself) from the teacher.

    `student` is [..., student dim], `teacher` [..., teacher dim], `weight` [teacher dim, student dim], `bias` [teacher
    dim]; `mask` is boolean with the leading axes, true at valid tokens. `distance` is a `FeatureDistanceFormula` or a
    name. Of each token: `mse`, the mean over the dimensions of (y - t)²; `squared_error`, the sum; `l2`, its root,
    whose gradient is 0 where y = t; `huber`, the mean over the dimensions of (y - t)² / 2, or of
    delta (|y - t| - delta / 2) where |y - t| > delta; `cosine`, 1 - y·t / (|y| |t|) with epsilon under both roots;
    `normalised_mse`, |y - t|² / (|t|² + epsilon). `relative_mse` is Σ|y - t|² / Σ|t|² over all valid tokens.

    `reduction="mean"` is over valid tokens; `"sum"` is 0 when there is none; `"none"` gives one value per token, 0
    where it is not valid. Gradients go to student, weight and bias, never to the teacher. `chunk_size` is the number of
    tokens projected at a time by `impl="streaming"`, whose scalar values allow one backward.

    Raises:
        UsageError: shapes, dtypes, devices or options that do not fit, a mean over no tokens, a teacher that is 0, or a
            call in which only the teacher requires gradients.
        NonFiniteLoss: the distance of a valid token is NaN or infinite.

    Example:
        >>> import torch
        >>> from xarch_kd.ops import projected_distance
        >>> student, weight = torch.randn(2, 5, 4), torch.randn(8, 4, requires_grad=True)
        >>> projected_distance(student, torch.randn(2, 5, 8), weight=weight, distance="cosine").total.backward()
    """
    formula = read_distance(distance, reduction, epsilon, delta)
    checks.check_chunk_size(chunk_size)
    inputs = check_inputs(
        student, teacher, weight=weight, bias=bias, formula=formula, mask=mask, epsilon=epsilon, delta=delta
    )
    unsupported_reason = fused.unsupported_reason(inputs)
    implementation = choose(
        "projected_distance", impl, {} if unsupported_reason is None else {"fused": unsupported_reason}
    )
    if reduction == "mean" and inputs.tokens == 0:
        raise checks.refuse_mean_of_nothing()
    chunk = chunk_size or default_chunk(inputs)
    divisor = _divisor(inputs, reduction, chunk)
    if implementation == "reference":
        with torch.autocast(student.device.type, enabled=False):
            values = token_values(inputs)
        result = spread(values, inputs.valid_indices, inputs.shape) if reduction == "none" else values.sum() / divisor
    else:
        run = fused.forward_backward if implementation == "fused" else forward_backward
        result = _forward_backward(run, inputs, reduction, divisor, chunk)
    checks.require(
        checks.all_finite(result),
        lambda: NonFiniteLoss(
            f"The distance '{formula.name}' is not finite.",
            found="a NaN or infinite value in the features or the projector",
            allowed="finite features at every valid token",
        ),
    )
    return ProjectedDistance(result, divisor)


def _divisor(inputs: ProjectedDistanceInputs, reduction: str, chunk: int) -> Tensor:
    one = inputs.teacher.new_ones((), dtype=inputs.dtype)
    if inputs.formula.over_teacher_energy:
        total = energy(inputs, chunk)
        if not bool(total > 0) and bool(torch.isfinite(total)):
            raise UsageError(
                f"{inputs.formula.name} divides by the teacher's energy.", found="a teacher that is 0 everywhere"
            )
        return total
    return one * inputs.tokens if reduction == "mean" else one


def _forward_backward(
    run: Callable[[ProjectedDistanceInputs, Tensor | None, tuple[bool, ...], int], ForwardBackward],
    inputs: ProjectedDistanceInputs,
    reduction: str,
    divisor: Tensor,
    chunk: int,
) -> Tensor:
    trained = (inputs.student, inputs.weight, inputs.bias)
    needs = wanted(*trained)
    if reduction != "none":
        result = run(inputs, divisor.reciprocal() if any(needs) else None, needs, chunk)
        value = result.values.sum() / divisor
        return attach_gradients(value, trained, _gradients(result, inputs)) if any(needs) else value
    values = spread(run(inputs, None, (False,) * 3, chunk).values, inputs.valid_indices, inputs.shape)
    if not any(needs):
        return values

    def backward(upstream: Tensor) -> Gradients:
        picked = pick(upstream.reshape(-1), inputs.valid_indices)
        return _gradients(run(inputs, picked, needs, chunk), inputs)

    return recompute(values, trained, backward)


def _gradients(result: ForwardBackward, inputs: ProjectedDistanceInputs) -> Gradients:
    pairs = ((result.student, inputs.student), (result.weight, inputs.weight), (result.bias, inputs.bias))
    return [stored(gradient, like) for gradient, like in pairs]
