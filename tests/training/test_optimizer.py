from __future__ import annotations

import importlib.util
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers.training_args import OptimizerNames

from xarch_kd.mapping_file.objectives import Tokens
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.mapping_file.training import Optimizer, OptimizerName, WeightAveraging
from xarch_kd.planning import optimizers
from xarch_kd.planning.optimizers import optimizer_problems
from xarch_kd.training.optimizer import build_optimizer, parameter_groups


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


def test_the_default_is_adamw_with_the_options_of_the_stage() -> None:
    settings = Optimizer(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), projector_lr=0.5, projector_weight_decay=0.0)
    projector = nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(model(), [projector], settings, MIXERS)
    assert type(optimizer) is torch.optim.AdamW
    groups = optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.1), (0.01, 0.0), (0.5, 0.0)]
    assert {(group["betas"], group["eps"], group["amsgrad"]) for group in groups} == {((0.8, 0.9), 1e-8, False)}


def test_projectors_that_start_in_closed_form_move_at_a_tenth_of_the_rate() -> None:
    fitted, other = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    for settings, rates in (
        (Optimizer(lr=0.5), (0.5, 0.05)),
        (Optimizer(lr=0.5, projector_lr=0.2), (0.2, 0.2)),
    ):
        groups = build_optimizer(model(), [other, fitted], settings, MIXERS, fitted=[fitted]).param_groups[-2:]
        assert [group["lr"] for group in groups] == pytest.approx(rates)
        assert [group["params"][0] is parameter for group, parameter in zip(groups, (other, fitted), strict=True)] == [
            True,
            True,
        ]


STEPS_BY_HAND = {
    # Of the first step, for a gradient of 1 and a learning rate of 0.01.
    "sgd": ({"momentum": 0.9}, 0.01),
    "adamw_torch": ({"amsgrad": True}, 0.01),
    "adamw_torch_fused": ({}, 0.01),
    "adagrad": ({}, 0.01),
    "rmsprop": ({"alpha": 0.75}, 0.02),
    "adafactor": ({}, 0.01),
}


@pytest.mark.parametrize("name", STEPS_BY_HAND)
def test_an_optimizer_by_name_takes_its_first_step(name: Any) -> None:
    arguments, moved = STEPS_BY_HAND[name]
    settings = Optimizer(optim=name, args=arguments, lr=0.01, projector_lr=0.1)
    student, projector = model(), nn.Parameter(torch.zeros(2, 2))
    before = {key: parameter.detach().clone() for key, parameter in student.named_parameters()}
    optimizer = build_optimizer(student, [projector], settings, MIXERS)
    (sum(parameter.sum() for parameter in student.parameters()) + projector.sum()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for key, parameter in student.named_parameters():
        expected = torch.full_like(parameter, 0.0 if key == "frozen.weight" or key == "frozen.bias" else moved)
        torch.testing.assert_close(before[key] - parameter.detach(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(projector.detach(), torch.full((2, 2), -10 * moved), rtol=1e-4, atol=1e-6)


def test_the_names_are_those_of_transformers() -> None:
    assert set(get_args(OptimizerName)) == {name.value for name in OptimizerNames}


def stage_with(optimizer: dict[str, Any], **changes: Any) -> Stage:
    return Stage(name="s", steps=1, train=("all",), tokens=Tokens(), optimizer=Optimizer(**optimizer), **changes)


PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"optim": "stable_adamw"},
        "optim",
        "needs the package 'optimi', which is not installed: pip install torch-optimi",
    ),
    ({"optim": "lion_8bit"}, "optim", "pip install bitsandbytes"),
    ({"optim": "galore_adamw"}, "optim", "the stage's rates and weight decay would not hold"),
    ({"optim": "lomo"}, "optim", "during the backward pass"),
    ({"optim": "sgd", "args": {"momentun": 0.9}}, "args", "'sgd' has no argument 'momentun'. Did you mean 'momentum'?"),
    ({"optim": "sgd", "args": {"lr": 0.9}}, "args", "lr is a key of optimizer itself"),
    ({"optim": "sgd", "betas": (0.9, 0.99)}, "betas", "'sgd' has no betas"),
]


@pytest.mark.parametrize(("optimizer", "key", "words"), PROBLEMS, ids=lambda value: str(value)[:40])
def test_an_optimizer_that_cannot_be_used_is_refused(
    optimizer: dict[str, Any], key: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = optimizer_problems(stage_with(optimizer), ("optimizer",))
    assert problem.place == ("optimizer", key)
    assert words in problem.message


def test_a_schedule_free_optimizer_takes_no_schedule_and_no_other_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(optimizers, "optimizer_class", lambda settings: (torch.optim.AdamW, {}))
    free = {"optim": "schedule_free_adamw"}
    (problem,) = optimizer_problems(stage_with(free), ("optimizer",))
    assert "schedule: constant" in problem.message
    assert not list(optimizer_problems(stage_with({**free, "schedule": "constant"}), ("optimizer",)))
    averaged = stage_with({**free, "schedule": "constant"}, ema=WeightAveraging())
    (problem,) = optimizer_problems(averaged, ("optimizer",))
    assert "averages weights itself" in problem.message
