"""Checks of the factors of mixings."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from xarch_kd.errors import UsageError


def check_shape(kind: str, name: str, tensor: Tensor, axes: str, sizes: tuple[int, ...]) -> None:
    """Raise UsageError unless the factor `name`, with these axes, has these sizes."""
    if tuple(tensor.shape) != sizes:
        raise UsageError(
            f"The factor '{name}' of a {kind} mixing has the wrong shape.",
            found=list(tensor.shape),
            allowed=f"[{axes}] = {list(sizes)}",
        )


def check_rank(kind: str, name: str, tensor: Tensor, *axes: str) -> None:
    """Raise UsageError unless the factor has the rank of one of these axes, e.g. "batch, time, heads"."""
    ranks = [text.count(",") + 1 for text in axes]
    if tensor.dim() not in ranks:
        raise UsageError(
            f"The factor '{name}' of a {kind} mixing has the wrong number of axes.",
            found=list(tensor.shape),
            allowed=" | ".join(f"[{text}]" for text in axes),
        )


def check_decay(kind: str, log_decay: Tensor, query: tuple[int, ...]) -> None:
    """Raise UsageError unless `log_decay` has one value per head, or one per channel of queries of that shape."""
    check_rank(kind, "log_decay", log_decay, "batch, time, heads", "batch, time, heads, dim")
    per_channel = log_decay.dim() == 4
    axes = "batch, time, heads, dim" if per_channel else "batch, time, heads"
    check_shape(kind, "log_decay", log_decay, axes, query if per_channel else query[:3])


def check_divides(kind: str, groups: int, heads: int, what: str) -> None:
    """Raise UsageError unless `groups` divides `heads`."""
    if groups < 1 or heads % groups:
        raise UsageError(
            f"The {what} of a {kind} mixing do not divide evenly.",
            found=f"{groups} for {heads}",
            allowed=f"a divisor of {heads}",
        )


def check_scale(kind: str, scale: float) -> None:
    """Raise UsageError unless the scale is finite."""
    if not math.isfinite(scale):
        raise UsageError(f"The scale of a {kind} mixing must be finite.", asked=scale)


def check_factors(kind: str, factors: Mapping[str, Tensor], sizes: tuple[int, int, int]) -> None:
    """Raise UsageError unless factors are floating point and on one device, and batch, time and heads at least 1."""
    if min(sizes) < 1:
        raise UsageError(
            f"A {kind} mixing needs sequences, tokens and heads.", found=f"batch, time, heads = {sizes}", allowed="≥ 1"
        )
    first = next(iter(factors))
    for name, factor in factors.items():
        if not factor.is_floating_point():
            raise UsageError(
                f"The factor '{name}' of a {kind} mixing is not a floating-point tensor.", found=factor.dtype
            )
        if factor.device != factors[first].device:
            raise UsageError(
                f"The factors of a {kind} mixing are on several devices.",
                found=f"{name} on {factor.device}, {first} on {factors[first].device}",
            )


def check_valid_range(kind: str, valid_range: Tensor | None, batch: int, time: int, device: object) -> None:
    """Raise UsageError unless the valid range is None or int64 [batch, 2] on the device.

    On a CPU also unless 0 <= start <= stop <= time; elsewhere reading it would synchronize with the device.
    """
    if valid_range is None:
        return
    if valid_range.shape != (batch, 2) or valid_range.dtype != torch.int64:
        raise UsageError(
            f"The valid range of a {kind} mixing has another form.",
            found=f"{list(valid_range.shape)} of {valid_range.dtype}",
            allowed=f"[batch, 2] = [{batch}, 2] of torch.int64",
        )
    if valid_range.device != device:
        raise UsageError(
            "The valid range and the factors are not on one device.", found=valid_range.device, allowed=device
        )
    if str(device) != "cpu":
        return
    start, stop = valid_range.unbind(1)
    if bool(((start < 0) | (start > stop) | (stop > time)).any()):
        raise UsageError(
            f"The valid range of a {kind} mixing is not inside the sequence.",
            found=f"start {start.tolist()}, stop {stop.tolist()}",
            allowed=f"0 <= start <= stop <= {time}",
        )


def check_sign(kind: str, name: str, tensor: Tensor, *, negative: bool) -> None:
    """Raise UsageError if a value has the wrong sign.

    Only on a CPU: elsewhere reading the values would synchronize with the device.
    """
    if tensor.device.type != "cpu":
        return
    worst = (tensor.detach() if negative else -tensor.detach()).nan_to_num(nan=0).max().item()
    if worst > 0:
        raise UsageError(
            f"The factor '{name}' of a {kind} mixing has the wrong sign.",
            found=worst if negative else -worst,
            allowed="at most 0" if negative else "at least 0",
        )
