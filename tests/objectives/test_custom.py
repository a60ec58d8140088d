"""A loss, a divergence, a layer map and a projector from outside the package, by their names in a mapping file."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.objectives.stages import PAIRS, entry, plan_of
from xarch_kd.errors import MappingFileError, NonFiniteLoss, UsageError
from xarch_kd.files import write_tensors
from xarch_kd.job.evaluate import evaluate
from xarch_kd.job.fingerprint import mapping_fingerprint
from xarch_kd.job.train import train
from xarch_kd.layer_mapping import LayerMap
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.taps.trace import trace
from xarch_kd.testing.runs import events_of
from xarch_kd.training.aligner import Aligner


def mean_squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    token = (student - teacher).square().mean(-1)
    return token.mean() if mask is None else token[mask].mean()


def kullback_leibler(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def end_aligned(student_layers: int, teacher_layers: int) -> Tensor:
    weights = torch.zeros(student_layers, teacher_layers)
    for layer in range(student_layers):
        weights[layer, math.ceil((layer + 1) * teacher_layers / student_layers) - 1] = 1.0
    return weights


class Identity(nn.Module):
    """A matrix that starts as the identity, as the built-in linear projector between equal dims does."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(teacher_dim, student_dim))

    def forward(self, student: Tensor) -> Tensor:
        return student @ self.weight.T


OBJECTS: dict[str, dict[str, Any]] = {
    "objectives": {"mine": mean_squared_error},
    "divergences": {"mine": kullback_leibler},
    "layer_maps": {"mine": end_aligned},
    "projectors": {"mine": Identity},
}
CUSTOM = {
    "layers": {"strategy": "custom", "name": "mine"},
    "loss": {"kind": "custom", "name": "mine", "weight": 0.5},
    "projector": {"kind": "custom", "name": "mine"},
}
BUILT_IN = {
    "layers": "uniform",
    "loss": {"kind": "mse", "weight": 0.5},
    "projector": {"kind": "linear", "init": "random"},
}


def mapping(folders: dict[str, Path], align: dict[str, Any], divergence: Any) -> MappingFile:
    stage = {
        "name": "one",
        "steps": 3,
        "gradient_accumulation": 2,
        "train": ["all"],
        "align": [{"name": "e", "tap": "hidden", **align}],
        "tokens": {"divergence": divergence, "temperature": 2.0, "cross_entropy": 0.1},
        "optimizer": {"lr": 1e-3},
    }
    text = folders["teacher"] / "text.txt"
    text.write_text("".join(f"{number} and {number * number}.\n\n" for number in range(300)), encoding="utf-8")
    whole = {
        "version": 1,
        "teacher": {"model": str(folders["teacher"])},
        "student": {"model": str(folders["llama"])},
        "data": {"files": [str(text)], "sequence_length": 16, "batch_size": 2},
        "device": "cpu",
        "stages": [stage],
        "evaluate": {"suites": ["likelihood"], "tokens": 64},
    }
    return MappingFile.model_validate_json(json.dumps(whole))


def custom_plan(folders: dict[str, Path], **objects: Any) -> Plan:
    return make_plan(mapping(folders, CUSTOM, {"kind": "custom", "name": "mine"}), **{**OBJECTS, **objects})


def test_objects_from_outside_train_as_the_same_formulas_of_the_package_do(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plans = {"custom": custom_plan(folders), "built-in": make_plan(mapping(folders, BUILT_IN, "forward_kl"))}
    assert not any("mine" in warning for plan in plans.values() for warning in plan.warnings)
    figures, projectors = {}, {}
    for name, plan in plans.items():
        run = train(plan, tmp_path / name, console=Console(file=io.StringIO()))
        figures[name] = [event["parts"] for event in events_of(tmp_path / name) if event["event"] == "step"]
        projectors[name] = list(load_file(run.folder.projectors).values())
    assert len(figures["custom"]) == 3
    for own, other in zip(figures["custom"], figures["built-in"], strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    for own, other in zip(projectors["custom"], projectors["built-in"], strict=True):
        assert not torch.equal(own, torch.eye(64))
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    # A student is measured without the objects that trained it.
    assert evaluate(tmp_path / "custom", tokens=32, console=Console(file=io.StringIO())).likelihood


def test_what_trains_beside_the_student_is_restored(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = custom_plan(folders)
    teacher, student = (AutoModelForCausalLM.from_pretrained(folders[name]) for name in ("teacher", "llama"))
    first, second = (Aligner(custom_plan(folders), teacher=teacher, student=student) for _ in range(2))
    assert plan.stages[0].projector_parameters == 2 * 64 * 64
    with torch.no_grad():
        for parameter in first.projectors.parameters():
            parameter.add_(1.0)
    write_tensors(tmp_path / "state.safetensors", first.trained_state())
    second.load_trained_state(tmp_path / "state.safetensors")
    for own, other in zip(first.projectors.parameters(), second.projectors.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_run_belongs_to_its_objects(folders: dict[str, Path]) -> None:
    def another(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        return mean_squared_error(student, teacher, mask)

    prints = [mapping_fingerprint(custom_plan(folders, **more)) for more in ({}, {}, {"objectives": {"mine": another}})]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_name_that_was_not_passed_is_refused_with_those_that_were(folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(MappingFileError) as caught:
        custom_plan(folders, **{kind: {"mina": OBJECTS[kind]["mine"]}})
    (problem,) = caught.value.problems
    assert f"no object named 'mine' was passed, and a mapping file cannot name code. Passed as {kind}: mina" in problem
    assert f"xkd.plan(mapping, {kind}={{'mine': …}})" in problem
    with pytest.raises(MappingFileError, match=f"Passed as {kind}: none"):
        custom_plan(folders, **{kind: None})


def test_an_object_that_is_not_used_is_warned_of(folders: dict[str, Path]) -> None:
    plan = make_plan(mapping(folders, BUILT_IN, "forward_kl"), projectors={"mine": Identity})
    assert "projectors: 'mine' was passed, and the mapping file does not refer to it" in plan.warnings


def odd_projector(student_dim: int, teacher_dim: int) -> nn.Module:
    return nn.Linear(student_dim, teacher_dim + 1)


PLAN_TIME: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"objectives": {"mine": 3}}, r"objectives= cannot be called(.|\n)*found: +int"),
    "a loss with parameters": ({"objectives": {"mine": nn.Linear(2, 2)}}, "'mine' has parameters"),
    "a divergence without log_q": ({"divergences": {"mine": lambda q, p: q}}, "log_q and log_p"),
    "a map of another shape": (
        {"layer_maps": {"mine": lambda student, teacher: torch.eye(teacher)}},
        r"'mine' returned \[4, 4\]; allowed: weights \[2, 4\]",
    ),
    "a map that is no tensor": ({"layer_maps": {"mine": lambda student, teacher: "same"}}, "'mine' returned str"),
    "a map whose rows sum to 2": (
        {"layer_maps": {"mine": lambda student, teacher: 2 * end_aligned(student, teacher)}},
        "custom mine are no layer map",
    ),
    "a map of zeros": ({"layer_maps": {"mine": lambda *depths: torch.zeros(depths)}}, "'mine' is 0 everywhere"),
    "a projector of another shape": (
        {"projectors": {"mine": odd_projector}},
        r"'mine' returned another shape(.|\n)*\[1, 2, 65\]",
    ),
    "a factory without a module": ({"projectors": {"mine": lambda *dims: torch.eye(*dims)}}, "returns no module"),
}


@pytest.mark.parametrize("case", PLAN_TIME)
def test_objects_that_do_not_fit_are_refused_by_the_plan(folders: dict[str, Path], case: str) -> None:
    objects, message = PLAN_TIME[case]
    with pytest.raises(UsageError, match=message):
        custom_plan(folders, **objects)


def loss_of(
    folders: dict[str, Path], teacher: PreTrainedModel, function: Callable[..., Any], tap: str = "hidden"
) -> tuple[Aligner, Tensor]:
    layers = None if tap == "head_input" else "uniform"
    align = entry(tap=tap, layers=layers, loss={"kind": "custom", "name": "mine"})
    plan = plan_of(folders, align, student="llama", objectives={"mine": function})
    aligner = Aligner(plan, teacher=teacher, student=AutoModelForCausalLM.from_pretrained(folders["llama"]))
    return aligner, torch.arange(32).view(2, 16)


RUN_TIME: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "NaN": (lambda student, teacher, mask: student.sum() * math.nan, NonFiniteLoss, r"objective e\.0"),
    "a value per token": (
        lambda student, teacher, mask: (student - teacher).square().mean(-1),
        UsageError,
        r"'mine' returned something else than a scalar(.|\n)*objective e\.0(.|\n)*\[2, 16\](.|\n)*shape \[\]",
    ),
    "a number": (lambda student, teacher, mask: 1.0, UsageError, r"something else than a scalar(.|\n)*float"),
    "no gradient": (
        lambda student, teacher, mask: (student.detach() - teacher).square().mean(),
        UsageError,
        r"'mine' returned a value without a gradient(.|\n)*objective e\.0",
    ),
}


@pytest.mark.parametrize("case", RUN_TIME)
def test_what_an_objective_returns_is_checked(folders: dict[str, Path], teacher: PreTrainedModel, case: str) -> None:
    function, error, message = RUN_TIME[case]
    aligner, ids = loss_of(folders, teacher, function)
    with pytest.raises(error, match=message):
        aligner(input_ids=ids)


@pytest.mark.parametrize("tap", ["hidden", "values", "mixing", "head_input"])
def test_an_objective_gets_what_its_tap_reads_and_never_trains_the_teacher(
    folders: dict[str, Path], teacher: PreTrainedModel, tap: str
) -> None:
    seen: list[Any] = []

    def function(student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
        seen.append((student, teacher))
        return student.sum() if isinstance(student, Tensor) else student.query.sum()

    aligner, ids = loss_of(folders, teacher, function, tap)
    loss = aligner(input_ids=ids).loss
    loss.backward()
    own, other = seen[0]
    shape = {"hidden": (2, 16, 64), "head_input": (2, 16, 64)}.get(tap)
    if shape is not None:
        assert own.shape == other.shape == shape
    if isinstance(other, Tensor):
        assert not other.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in aligner.student.parameters())


def test_micro_batches_are_weighted_by_their_tokens(folders: dict[str, Path], teacher: PreTrainedModel) -> None:
    aligner, ids = loss_of(folders, teacher, mean_squared_error)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    whole = aligner(input_ids=ids, attention_mask=mask)
    whole.loss.backward()
    gradient = next(aligner.student.parameters()).grad
    assert gradient is not None
    by_mask = mean_squared_error_of_both(aligner, teacher, ids, mask)
    torch.testing.assert_close(whole.loss.detach(), by_mask, rtol=1e-5, atol=0)
    empty = aligner(input_ids=ids, attention_mask=torch.zeros_like(mask))
    assert empty.loss == 0


def mean_squared_error_of_both(aligner: Aligner, teacher: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros(())
    for own, other in PAIRS:
        student = trace(aligner.student, ids, mask.long(), taps=["hidden"], layers=[own])["hidden"][own]
        target = trace(teacher, ids, mask.long(), taps=["hidden"], layers=[other])["hidden"][other]
        total = total + mean_squared_error(student.detach(), target.detach(), mask)
    return total


def test_a_layer_map_may_be_a_layer_map(folders: dict[str, Path]) -> None:
    made = LayerMap.from_targets("mine", [None, 2], 4)
    plan = custom_plan(folders, layer_maps={"mine": lambda student, teacher: made})
    assert [(pair.student_layer, pair.teacher_layer) for pair in plan.stages[0].pairs] == [(1, 2)]
