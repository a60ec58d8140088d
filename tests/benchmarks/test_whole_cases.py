"""Cases whose calls are whole steps or passes: their contenders, and their FLOP formulas against counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import Case
from benchmarks.cases import CASES, alignment, calibration
from benchmarks.session import Session

(STEP, *_), (PASS, *_) = CASES["alignment"], CASES["calibration"]
SMALL = {**STEP.sizes, **STEP.quick}


def quick_inputs(case: Case) -> dict[str, torch.Tensor]:
    return case.draw({**case.sizes, **case.quick}, "cpu")


def products_with_weights(case: Case, name: str) -> int:
    """FLOPs of one call's products with weights; batched products belong to attention and recurrences."""
    sizes = {**case.sizes, **case.quick}
    run, inputs = case.contenders[name].make({**case.options, **sizes}), quick_inputs(case)
    with FlopCounterMode(display=False) as counter:
        run(inputs)
    counted = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counted.items() if str(operation) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize(("case", "name"), [(STEP, "logits only"), (PASS, "teacher")])
def test_flops_are_the_products_with_weights(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter misses products that are added in place.
    monkeypatch.setenv("XARCH_KD_IMPL", "reference")
    assert products_with_weights(case, name) == case.flops({**case.sizes, **case.quick})


def test_hidden_states_of_that_many_pairs_are_matched() -> None:
    layers: tuple[Any, ...] = (None, alignment.FOUR, "uniform")
    for asked, expected in zip(layers, ((), (1, 3, 5, 7), tuple(range(8))), strict=True):
        aligner: Any = alignment.aligner_of(SMALL, asked)
        pairs = aligner.stage.pairs
        assert [(pair.student_layer, pair.teacher_layer) for pair in pairs] == [(layer, layer) for layer in expected]
        assert {(pair.tap, pair.projector, pair.loss) for pair in pairs} <= {("hidden", "linear", "normalised_mse")}
        assert len(aligner.projectors) == len(expected)
        assert all(parameter.requires_grad for parameter in aligner.student.parameters())
        assert aligner.stage.stage.tokens is not None


def test_a_call_is_a_step_on_both_the_student_and_the_projectors(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner: Any = alignment.aligner_of(SMALL, alignment.FOUR)
    monkeypatch.setattr(alignment, "aligner_of", lambda *_: aligner)
    before = {name: tensor.detach().clone() for name, tensor in aligner.named_parameters()}
    inputs = quick_inputs(STEP)
    run = STEP.contenders["logits, hidden of 4 pairs"].make(SMALL)
    losses = [run(inputs).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert [name for name, tensor in aligner.named_parameters() if torch.equal(tensor, before[name])] == []
    assert all(tensor.grad is None for tensor in aligner.parameters())


def test_the_teacher_of_the_calibration_has_the_sizes_it_says() -> None:
    # Of SmolLM2-135M.
    with torch.device("meta"):
        config = calibration.teacher_model(PASS.sizes).config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)


def test_an_idle_teacher_computes_nothing() -> None:
    sizes = {**PASS.sizes, **PASS.quick}
    idle = calibration.teacher_model(sizes, idle=True)
    ids = torch.arange(32).reshape(2, 16)
    embedded = idle.model.embed_tokens(ids)
    states = idle.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], embedded, rtol=0, atol=0)
    passes = [products_with_weights(PASS, name) for name in ("calibration", "calibration beyond the teacher")]
    assert passes[0] - passes[1] == products_with_weights(PASS, "teacher without head")


def test_warm_sizes_are_those_of_the_first_call_alone() -> None:
    seen: list[int] = []
    contender = PASS.contenders["teacher"]

    def make(options: Any) -> Any:
        assert options["rows"] == PASS.sizes["rows"]

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            seen.append(inputs["text"].shape[0])
            return torch.zeros(())

        return run

    case = dataclasses.replace(PASS, contenders={"teacher": dataclasses.replace(contender, make=make)})
    session = Session(case, "teacher", device="cpu")
    assert session.prepare() is None
    session.seconds()
    assert seen == [PASS.warm["rows"], PASS.sizes["rows"]]
    assert session.errors() is None
