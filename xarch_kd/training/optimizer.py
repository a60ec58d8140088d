"""Optimizer of a stage: matrices decay, vectors do not, and mixers may have a learning rate of their own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from xarch_kd.mapping_file.training import Optimizer
from xarch_kd.planning.optimizers import optimizer_class


def build_optimizer(
    student: nn.Module,
    auxiliary: list[nn.Parameter],
    settings: Optimizer,
    mixers: Collection[str],
    *,
    fitted: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters of `student` and of `auxiliary` ones, projectors and maps.

    Those of `auxiliary` that are in `fitted` are of projectors that start in closed form.
    """
    decay = settings.weight_decay if settings.projector_weight_decay is None else settings.projector_weight_decay
    known = {id(parameter) for parameter in fitted}
    groups = parameter_groups(student, settings, mixers)
    for is_fitted in (False, True):
        parameters = [parameter for parameter in auxiliary if (id(parameter) in known) == is_fitted]
        rate = settings.projector_rate(is_fitted=is_fitted)
        groups.append({"params": parameters, "weight_decay": decay, "lr": rate})
    kind, options = optimizer_class(settings)
    return kind([group for group in groups if group["params"]], **options)


def parameter_groups(student: nn.Module, settings: Optimizer, mixers: Collection[str]) -> list[dict[str, Any]]:
    """Return the trainable parameters of `student` as groups of an optimizer; `mixers` names those of mixers.

    Without `mixer_lr` there are two groups, at the learning rate of the optimizer. With it there are four.
    """
    trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    if settings.mixer_lr is None:
        return _by_decay([parameter for _, parameter in trained], settings)
    names = set(mixers)
    body = [parameter for name, parameter in trained if name not in names]
    mixing = [parameter for name, parameter in trained if name in names]
    return [*_by_decay(body, settings), *_by_decay(mixing, settings, lr=settings.mixer_lr)]


def _by_decay(parameters: list[nn.Parameter], settings: Optimizer, **rate: float) -> list[dict[str, Any]]:
    # By shape, not by `Trainer.get_decay_parameter_names`: that decays every parameter whose name has neither "norm"
    # nor "bias", among them `A_log` and `D` of state-space mixers.
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay, **rate},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, **rate},
    ]


def set_mode(optimizer: Any, *, training: bool) -> None:
    """Let an optimizer that averages weights itself (schedule-free) give the model its average, or take it back."""
    change = getattr(optimizer, "train" if training else "eval", None)
    if callable(change):
        change()
