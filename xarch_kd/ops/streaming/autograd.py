"""Connection of streamed operations to autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xarch_kd.errors import UsageError

Gradients = list[Tensor | None]


def wanted(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Return for each tensor whether autograd records its gradient; all false under `torch.no_grad`."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)


def stored(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return a gradient as it is kept until backward.

    float16 is kept wide: a mean's gradient may lie below its smallest number until a loss scale multiplies it.
    """
    if gradient is None or like is None or like.dtype == torch.float16:
        return gradient
    return gradient.to(like.dtype)


def attach_gradients(value: Tensor, inputs: Sequence[Tensor | None], gradients: Gradients) -> Tensor:
    """Return the scalar `value`; its backward gives each input its gradient times the upstream one.

    The stored gradients are scaled in place and released, so that they are never in memory twice; a second backward
    through the same value is refused.
    """
    return _AttachGradients.apply(value, gradients, *inputs)


def recompute(values: Tensor, inputs: Sequence[Tensor | None], backward: Callable[[Tensor], Gradients]) -> Tensor:
    """Return `values` (one per token); `backward(upstream)` computes the inputs' gradients in the backward pass."""
    return _Recompute.apply(values, backward, *inputs)


def _refuse_second_derivative() -> None:
    # Autograd runs a backward with gradients enabled only to differentiate it again (create_graph=True).
    if torch.is_grad_enabled():
        raise UsageError(
            "A streamed operation has no second derivative.",
            asked="create_graph=True",
            fix="use impl='reference', which autograd differentiates twice",
        )


class _AttachGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if ctx.gradients is None:
            raise UsageError(
                "The gradient of a streamed operation was already used by an earlier backward.",
                allowed="one backward per call",
                fix="call the operation again, sum the losses before backward, or use impl='reference'",
            )
        gradients, ctx.gradients = ctx.gradients, None
        # The upstream gradient of a loss on which backward is called is 1; reading it is free only on a CPU.
        plain = upstream[0].device.type == "cpu" and float(upstream[0]) == 1.0
        scaled: Gradients = []
        while gradients:
            gradient, dtype = gradients.pop(0), ctx.dtypes[len(scaled)]
            if gradient is not None:
                gradient = (gradient if plain else gradient.mul_(upstream[0])).to(dtype)
            scaled.append(gradient)
        return None, None, *scaled


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, backward: Callable[[Tensor], Gradients], *inputs: Tensor | None) -> Tensor:
        ctx.recompute = backward
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        # Saved only so that autograd refuses a backward after one of them was changed in place.
        ctx.save_for_backward(*inputs)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        _ = ctx.saved_tensors
        gradients = ctx.recompute(upstream[0])
        return (
            None,
            None,
            *(
                None if gradient is None else gradient.to(dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )
