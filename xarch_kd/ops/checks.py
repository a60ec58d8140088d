"""Checks of tensors that several operations share; each error says what was found and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.errors import UsageError

REDUCTIONS = ("none", "mean", "sum")


def check_floating(**tensors: Tensor | None) -> None:
    """Raise UsageError unless every given tensor is floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise UsageError(f"{name} must be floating point.", found=tensor.dtype, allowed="float16 to float64")


def check_device(**tensors: Tensor | None) -> None:
    """Raise UsageError unless all given tensors are on one device."""
    places = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise UsageError("The tensors are on different devices.", found=found, allowed="one device")


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Raise UsageError unless `tensor` is None or has the expected shape, whose axes `meaning` names."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise UsageError(f"{name} does not fit.", found=list(tensor.shape), allowed=f"{list(expected)} {meaning}")


def check_mask(mask: Tensor | None) -> None:
    """Raise UsageError unless `mask` is None or boolean."""
    if mask is not None and mask.dtype != torch.bool:
        raise UsageError(
            "mask must be boolean, true where a token counts.",
            found=mask.dtype,
            allowed=torch.bool,
            fix="pass mask.bool()",
        )


def check_reduction(reduction: str) -> None:
    """Raise UsageError unless `reduction` is one of `none`, `mean` and `sum`."""
    if reduction not in REDUCTIONS:
        raise UsageError("There is no such reduction.", asked=reduction, allowed=" | ".join(REDUCTIONS))


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise UsageError unless `chunk_size` is None or a positive number of tokens."""
    if chunk_size is not None and chunk_size < 1:
        raise UsageError("chunk_size must be a positive number of tokens.", found=chunk_size, allowed=">= 1")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 when any tensor is float64, else float32: the dtype that values are computed in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def counted_tokens(count: int, keep: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the indices [k] of the tokens that count, or None when all `count` of them do."""
    if keep is None:
        return None
    indices = keep.reshape(-1).nonzero().squeeze(1).to(device)
    return None if indices.numel() == count else indices


def refuse_mean_of_nothing() -> UsageError:
    """Return the error for a mean over no tokens, which has no value."""
    return UsageError(
        "The mean over unmasked tokens has no value: no token counts.",
        found="every token is masked, ignored or has weight 0",
        allowed="at least one token",
        fix="use reduction='sum' and divide by the count of all micro-batches, or leave the batch out",
    )
