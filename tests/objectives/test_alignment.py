"""Entries of a stage as the aligner computes them, each against its own definition on traced features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.objectives.stages import PAIRS, TOKENS, Build, both, entry, plan_of
from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import random
from xarch_kd.losses import cka_loss, feature_loss, gram_loss, queries_and_keys, relation_loss
from xarch_kd.projectors import Projector
from xarch_kd.taps.trace import trace
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.loss_balancing import observe_gradients


@pytest.mark.parametrize("kind", ["cka", "gram"])
def test_similarity_losses_are_those_of_the_features(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor, kind: str
) -> None:
    aligner = build(entry(loss={"kind": kind, "weight": 0.5}))
    assert len(aligner.projectors) == 0
    compare = cka_loss if kind == "cka" else gram_loss
    expected = sum(compare(*both(aligner, teacher, input_ids, "hidden", p), normalizer=TOKENS) for p in PAIRS)
    torch.testing.assert_close(aligner(input_ids).loss, 0.5 * torch.as_tensor(expected))


@pytest.mark.parametrize("of", [None, "queries", "keys"])
@pytest.mark.parametrize("student", ["mamba2", "llama"])
def test_relations_are_those_of_values_queries_and_keys(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor, of: str | None, student: str
) -> None:
    tap = "values" if of is None else "mixing"
    loss = {"kind": "relation"} | ({} if of is None else {"of": of})
    aligner = build(entry(tap, loss=loss), student=student)
    expected = torch.zeros(())
    for pair in PAIRS:
        own, target = both(aligner, teacher, input_ids, tap, pair)
        if of is not None:
            place = ("queries", "keys").index(of)
            own, target = (queries_and_keys(mixing)[place] for mixing in (own, target))
        expected = expected + relation_loss(own, target, normalizer=TOKENS)
    output = aligner(input_ids)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    gradients = [parameter.grad for parameter in aligner.student.parameters() if parameter.grad is not None]
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0


def test_a_bridge_projects_queries_and_keys_each_by_its_own_map(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry("mixing", loss={"kind": "attention_bridge", "distance": "mse"}, projector="linear"))
    assert set(aligner.projectors) == {f"e-{layer}-{side}" for layer in (0, 1) for side in ("query", "key")}
    expected = torch.zeros(())
    for student, layer in PAIRS:
        sides = [queries_and_keys(mixing) for mixing in both(aligner, teacher, input_ids, "mixing", (student, layer))]
        for side in ("query", "key"):
            own, target = (getattr(found, side).flatten(2) for found in sides)
            weight = aligner.projectors[f"e-{student}-{side}"].weight
            assert isinstance(weight, Tensor)
            expected = expected + (own @ weight.T - target).square().mean() / 2
    torch.testing.assert_close(aligner(input_ids).loss, expected)


def test_a_learned_map_weighs_all_pairs_and_trains_by_its_own_objective(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    layers = {"strategy": "learned", "temperature": 2.0, "final_temperature": 0.5, "usage_floor": 0.0}
    aligner = build(entry(layers=layers, loss={"kind": "cka", "weight": 3.0}))
    learned: Any = aligner.maps["e"]
    with torch.no_grad():
        learned.logits.copy_(torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    losses = torch.stack(
        [
            torch.stack(
                [cka_loss(*both(aligner, teacher, input_ids, "hidden", (i, j)), normalizer=TOKENS) for j in range(4)]
            )
            for i in range(2)
        ]
    ).detach()
    # After 5 of 10 steps the temperature is the geometric mean of both.
    output = aligner(input_ids, step=5)
    weights = torch.softmax(learned.logits.detach(), 1)
    torch.testing.assert_close(output.parts["e.0"] + output.parts["e.1"], 3 * (weights * losses).sum())
    relative = losses / losses.mean(0, keepdim=True)
    torch.testing.assert_close(output.parts["e-map"], (weights * relative).sum(1).mean())
    output.loss.backward()
    logits = learned.logits.detach().clone().requires_grad_()
    (torch.softmax(logits, 1) * relative).sum(1).mean().backward()
    torch.testing.assert_close(learned.logits.grad, logits.grad)


def test_a_learned_map_without_a_student_block_that_nothing_trained_reaches(
    build: Build, input_ids: Tensor, folders: dict[str, Path]
) -> None:
    aligner = build(entry("mixer_output", "learned", loss={"kind": "cka"}), train=["mixers"])
    assert aligner.maps["e"].logits.shape == (2, 4)
    assert bool(torch.isfinite(aligner(input_ids).loss))


def test_a_random_map_is_drawn_anew_every_so_many_steps(build: Build, input_ids: Tensor) -> None:
    aligner = build(entry(layers={"strategy": "random", "seed": 3, "redraw": 4}))
    for step in range(10):
        drawn = random(2, 4, seed=3, draw=step // 4).pairs()
        assert [site.layer for site in aligner.targets(step).sites] == list(
            dict.fromkeys(layer for _, layer, _ in drawn)
        )
    seen = {aligner.targets(step).sites for step in range(10)}
    assert len(seen) > 1
    differing = next(step for step in range(10) if aligner.targets(step).sites != aligner.targets(0).sites)
    first, later = (float(aligner(input_ids, step=step).loss.detach()) for step in (0, differing))
    assert first != later


def test_a_schedule_scales_an_entry_and_leaves_it_out(build: Build, input_ids: Tensor) -> None:
    fading = {"kind": "linear", "start": 0.2, "end": 0.7, "initial": 1.0, "final": 0.0}
    late = {"kind": "constant", "start": 0.5}
    aligner = build(
        entry(name="fading", schedule=fading),
        entry(name="late", tap="mixer_output", schedule=late),
        tokens={"schedule": {"kind": "linear", "initial": 2.0, "final": 1.0}},
    )
    always = build(entry(name="fading"), entry(name="late", tap="mixer_output"), tokens={})
    always.projectors.load_state_dict(aligner.projectors.state_dict())
    plain = always(input_ids).parts
    for step, factor in ((0, 1.0), (2, 1.0), (4, 0.6), (7, 0.0), (9, 0.0)):
        parts = aligner(input_ids, step=step).parts
        for layer in (0, 1):
            found = parts.get(f"fading.{layer}", torch.zeros(()))
            torch.testing.assert_close(found, factor * plain[f"fading.{layer}"])
        assert ("late.0" in parts) == (step >= 5)
        # A factor of 0 is not computed, so the teacher is not read for it either.
        assert any(site.tap == "hidden" for site in aligner.targets(step).sites) == (factor > 0)
        torch.testing.assert_close(parts["tokens"], (2 - step / 10) * plain["tokens"])


def norm_of(aligner: Aligner, ids: Tensor, only: str) -> float:
    """The norm on the student of the gradient of one entry's share of the loss."""
    assert aligner.balance is not None
    loss = aligner.balance.scale(only) * aligner(ids, objective=only).loss
    student = [parameter for parameter in aligner.student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, student, allow_unused=True)
    return float(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())


def test_auto_weights_make_gradients_as_large_as_the_anchors(build: Build, input_ids: Tensor) -> None:
    aligner = build(
        entry(name="anchor", loss={"kind": "mse", "weight": 0.5}),
        entry(name="balanced", tap="mixer_output", loss={"kind": "mse", "weight": "auto"}),
    )
    assert aligner.balance is not None
    assert aligner.balance.anchor == "anchor"
    for step in range(aligner.balance.observations):
        assert not aligner.balance.done
        with pytest.raises(UsageError, match="were not balanced at this step"):
            aligner(input_ids, step=step)
        observe(aligner, input_ids, step)
        aligner(input_ids, step=step).loss.backward()
    assert aligner.balance.done
    # The student did not change in between, so the scale is the exact ratio; float32 sums differ in their last digits.
    assert norm_of(aligner, input_ids, "balanced") == pytest.approx(norm_of(aligner, input_ids, "anchor"), rel=1e-4)
    assert aligner.balance.scale("balanced") != 1


def observe(aligner: Aligner, ids: Tensor, step: int = 0) -> None:
    """Observe the gradients of a step of one micro-batch."""
    observe_gradients(aligner, lambda name: aligner(ids, step=step, objective=name).loss.backward(), step=step)


def test_observing_gradients_leaves_those_that_were_accumulated(build: Build, input_ids: Tensor) -> None:
    aligner = build(
        entry(name="anchor", loss={"kind": "mse"}),
        entry(name="balanced", tap="mixer_output", loss={"kind": "mse", "weight": "auto"}),
        entry(name="late", loss={"kind": "mse", "weight": "auto"}, schedule={"kind": "constant", "start": 0.5}),
    )
    parameters = [parameter for parameter in aligner.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    observe(aligner, input_ids)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in parameters if p.grad is not None)
    assert aligner.balance is not None
    # What is not active at a step is not counted at it.
    assert {name: len(seen) for name, seen in aligner.balance.ratios.items()} == {"balanced": 1}
    assert float(aligner(input_ids, objective="late").loss.detach()) == 0


def test_a_spans_outputs_are_matched_by_their_sum(build: Build, teacher: PreTrainedModel, input_ids: Tensor) -> None:
    """Mixer outputs add up: the gradient is that of the squared distance to the sum over the span."""
    outputs = trace(teacher, input_ids, taps=["mixer_output"])["mixer_output"]
    one = {"kind": "linear", "share": True}
    shared = build(entry("mixer_output", "block_average", loss={"kind": "mse"}, projector=one))
    shared(input_ids).loss.backward()
    weight = shared.projectors["e"].weight
    assert isinstance(weight, Tensor)
    own = trace(shared.student, input_ids, taps=["mixer_output"])["mixer_output"]
    loss = sum(
        ((own[layer] @ weight.T) - sum(outputs[block] for block in span)).square().mean()
        for layer, span in ((0, (0, 1)), (1, (2, 3)))
    )
    parameters = [p for p in shared.student.parameters() if p.grad is not None]
    for found, wanted in zip(parameters, torch.autograd.grad(torch.as_tensor(loss), parameters), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max() + 1))


def test_a_shared_projector_is_one_and_counted_once(build: Build, folders: dict[str, Path]) -> None:
    align = entry(projector={"kind": "linear", "share": True})
    aligner = build(align)
    assert set(aligner.projectors) == {"e"}
    assert plan_of(folders, align).stages[0].projector_parameters == 32 * 64
    assert plan_of(folders, entry()).stages[0].projector_parameters == 2 * 32 * 64


def test_a_feature_loss_with_a_projector_is_as_it_was(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry(layers=[{"student": 1, "teacher": 0, "weight": 3.0}, {"student": 1, "teacher": 2}]))
    expected = torch.zeros(())
    for layer, share in ((0, 0.75), (2, 0.25)):
        own, target = both(aligner, teacher, input_ids, "hidden", (1, layer))
        projector = aligner.projectors[f"e-1-{layer}"]
        assert isinstance(projector, Projector)
        loss = feature_loss("normalised_mse", own, target, normalizer=TOKENS, projector=projector)
        expected = expected + share * loss
    torch.testing.assert_close(aligner(input_ids).loss, expected)
