"""Norms of gradients: measured, bounded, and the first parameter whose gradient is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients down to the norm `largest`, and return the norm that they had.

    A norm that is NaN zeroes the finite gradients instead of spoiling them, so that the others can still be named.
    """
    norm = gradient_norm(model)
    bound = torch.where(norm.isnan(), torch.full_like(norm, math.inf), norm)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, bound)
    return norm


def nonfinite_parameter(model: nn.Module) -> str:
    """Return the name of the first parameter whose gradient is not finite."""
    bad = (
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    )
    return next(bad, "unknown: every gradient is finite, but their norm is not")
