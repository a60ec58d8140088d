from __future__ import annotations

import torch
from torch import nn

from xarch_kd.mapping_file.schema import Optimizer
from xarch_kd.training.optimizer import parameter_groups


def model() -> nn.ModuleDict:
    module = nn.ModuleDict({"mixer": nn.Linear(3, 4), "mlp": nn.Linear(4, 5), "frozen": nn.Linear(2, 2)})
    module["frozen"].requires_grad_(False)
    return module


MIXERS = ("mixer.weight", "mixer.bias", "frozen.weight")


def named(student: nn.Module, settings: Optimizer) -> list[tuple[set[str], float, float | None]]:
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return [
        ({names[id(parameter)] for parameter in group["params"]}, group["weight_decay"], group.get("lr"))
        for group in parameter_groups(student, settings, MIXERS)
    ]


def test_without_a_rate_of_their_own_mixers_are_with_the_rest() -> None:
    assert named(model(), Optimizer(weight_decay=0.1)) == [
        ({"mixer.weight", "mlp.weight"}, 0.1, None),
        ({"mixer.bias", "mlp.bias"}, 0.0, None),
    ]


def test_mixers_take_their_own_rate_and_nothing_frozen_is_in_a_group() -> None:
    assert named(model(), Optimizer(weight_decay=0.1, mixer_lr=0.5)) == [
        ({"mlp.weight"}, 0.1, None),
        ({"mlp.bias"}, 0.0, None),
        ({"mixer.weight"}, 0.1, 0.5),
        ({"mixer.bias"}, 0.0, 0.5),
    ]


def test_each_moves_by_its_rate() -> None:
    student = model()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    groups = [group for group in parameter_groups(student, Optimizer(mixer_lr=0.5), MIXERS) if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    sum(parameter.sum() for parameter in student.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    # AdamW's first step is the rate times the sign of the gradient, here 1, but for its epsilon of 1e-8.
    for name, rate in {"mixer.weight": 0.5, "mlp.bias": 0.01, "frozen.weight": 0.0}.items():
        moved = before[name] - dict(student.named_parameters())[name].detach()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-5, atol=1e-6)
