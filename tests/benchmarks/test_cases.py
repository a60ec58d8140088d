"""Consistency of the cases, and their FLOP formulas against counts of the naive computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import Case, Input, Sizes
from benchmarks.cases import CASES, GROWTHS
from benchmarks.cases.mixing_apply import flops_of_band, flops_of_state
from benchmarks.cases.mixing_distance import causal
from benchmarks.peers import REQUIREMENTS
from benchmarks.session import call

ROOT = Path(__file__).resolve().parents[2]
EVERY = [case for cases in CASES.values() for case in cases]
# Without a formula for the baseline: the dense matrix of a mixing is the package's own.
COUNTED = [case for case in EVERY if case.dense_flops is not None]
# Without a dense specification, hence without a file of the same name among the operations.
BESIDE_THE_OPERATIONS = {"mixing_apply", "alignment", "calibration"}


def name(case: Case) -> str:
    return f"{case.operation}: {case.name}"


def quick(case: Case) -> Sizes:
    return {**case.sizes, **case.quick}


def test_an_operation_has_one_name_everywhere() -> None:
    operations = {path.stem for path in (ROOT / "xarch_kd" / "ops" / "reference").glob("[!_]*.py")}
    assert operations, "the walk finds something"
    for folder, form in (("xarch_kd/ops", "{}.py"), ("tests/ops", "test_{}.py"), ("benchmarks/cases", "{}.py")):
        missing = [one for one in sorted(operations) if not (ROOT / folder / form.format(one)).is_file()]
        assert missing == [], folder
    assert set(CASES) == operations | BESIDE_THE_OPERATIONS


def test_every_case_file_is_in_the_registries() -> None:
    files = {path.stem for path in (ROOT / "benchmarks" / "cases").glob("[!_]*.py")}
    assert set(CASES) == set(GROWTHS) == files
    assert all(case.operation == operation for operation, cases in CASES.items() for case in cases)


@pytest.mark.parametrize("case", EVERY, ids=name)
def test_a_case_names_only_what_there_is(case: Case) -> None:
    known = {case.baseline, *(bound.contender for bound in case.bounds)}
    known |= {bound.against for bound in case.bounds if bound.against is not None}
    known |= {one.truth for one in case.contenders.values() if one.truth is not None}
    assert known <= set(case.contenders)
    assert {need for one in case.contenders.values() for need in one.needs} <= set(REQUIREMENTS)
    assert {axis for one in case.inputs.values() for axis in one.axes} <= set(case.sizes)
    assert set(case.quick) | set(case.proxy) <= set(case.sizes)
    assert case.axis is None or case.axis in case.sizes
    assert all((bound.at_most is None) != (bound.at_least is None) for bound in case.bounds)


def test_names_are_unique_and_growths_have_enough_cases() -> None:
    for operation, cases in CASES.items():
        assert len({case.name for case in cases}) == len(cases)
        for growth in GROWTHS[operation]:
            group = [case for case in cases if case.group == growth.group]
            assert len({case.sizes[case.axis] for case in group if case.axis is not None}) >= 3
            assert all(growth.contender in case.contenders for case in group)


@pytest.mark.parametrize("case", COUNTED, ids=name)
def test_flops_are_those_of_the_naive_computation(case: Case) -> None:
    sizes = quick(case)
    assert case.dense_flops is not None
    run, inputs = case.contenders[case.baseline].make(case.options), case.draw(sizes, "cpu")
    with FlopCounterMode(display=False) as counter:
        call(run, inputs)
    assert counter.get_total_flops() == case.dense_flops(sizes) > 0


@pytest.mark.parametrize("case", CASES["mixing_distance"], ids=name)
def test_the_task_is_the_causal_part_of_the_dense_computation(case: Case) -> None:
    sizes = quick(case)
    part = causal(sizes["time"], torch.device("cpu")).double().mean().item()
    assert case.dense_flops is not None
    assert case.flops(sizes) == pytest.approx(case.dense_flops(sizes) * part, rel=1e-12)


def test_flops_of_a_state_are_those_of_its_recurrence() -> None:
    sizes = {"batch": 2, "time": 5, "heads": 3, "state": 7, "width": 4, "taps": 4}
    every = sizes["batch"] * sizes["heads"]
    query, key = (torch.randn(every, sizes["time"], 7, requires_grad=True) for _ in range(2))
    values = torch.randn(every, sizes["time"], 4, requires_grad=True)
    state, outputs = torch.zeros(every, 7, 4), []
    with FlopCounterMode(display=False) as counter:
        for step in range(sizes["time"]):
            state = state + torch.bmm(key[:, step, :, None], values[:, step, None])
            outputs.append(torch.bmm(query[:, step, None], state))
        torch.cat(outputs).sum().backward()
    assert counter.get_total_flops() == flops_of_state(2)(sizes)
    assert flops_of_band(sizes) == 6 * 2 * 5 * 3 * 4 * 4


def test_bytes_count_inputs_once_and_gradients_once() -> None:
    case = next(case for case in CASES["linear_divergence"] if case.name == "forward_kl")
    sizes = {"tokens": 3, "vocabulary": 5, "student_width": 7, "teacher_width": 11}
    assert case.bytes(sizes) == 4 * (2 * (3 * 7 + 5 * 7) + 3 * 11 + 5 * 11)


@pytest.mark.parametrize("case", EVERY, ids=name)
def test_inputs_depend_on_the_seed_alone_and_ask_for_the_right_gradients(case: Case) -> None:
    drawn, again = case.draw(quick(case), "cpu"), case.draw(quick(case), "cpu")
    for key, tensor in drawn.items():
        torch.testing.assert_close(tensor, again[key], rtol=0, atol=0)
        assert tensor.is_leaf
        assert tensor.requires_grad == case.inputs[key].gradient
        assert str(tensor.dtype) == f"torch.{case.dtype}"
        assert tuple(tensor.shape) == case.inputs[key].shape(quick(case))


def test_transforms_give_what_their_names_say() -> None:
    def draw(transform: str) -> torch.Tensor:
        one = Input(axes=("rows", "columns"), transform=transform)
        return one.draw({"rows": 50, "columns": 20}, torch.Generator().manual_seed(0))

    assert bool((draw("positive") > 0).all())
    assert bool((draw("decay") < 0).all())
    assert bool(((draw("share") > 0) & (draw("share") < 1)).all())
    torch.testing.assert_close(draw("unit").norm(dim=-1), torch.ones(50))
    fan = Input(axes=("rows", "columns"), deviation="columns")
    drawn = fan.draw({"rows": 500, "columns": 100}, torch.Generator().manual_seed(0))
    # The deviation of 50 000 draws is known to 1/sqrt(2 * 50 000) = 0.3 %.
    assert drawn.std().item() == pytest.approx(0.1, rel=0.02)
