"""Entries of a stage as the aligner computes them, each against its own definition on traced features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import random
from xarch_kd.losses import cka_loss, feature_loss, gram_loss, queries_and_keys, relation_loss
from xarch_kd.losses.standardise import Standardiser
from xarch_kd.mapping_file.plan import Plan
from xarch_kd.mapping_file.resolve import make_plan
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.models.convert import convert
from xarch_kd.projectors import Projector
from xarch_kd.taps.trace import trace
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.preparation import FIRST_TOKENS, prepare, tokens_to_prepare

TOKENS = 2 * 16


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=4).requires_grad_(False)


@pytest.fixture(scope="module")
def students() -> dict[str, PreTrainedModel]:
    """A narrower and shallower Mamba-2, and a Transformer with fewer heads."""
    return {
        "mamba2": tiny_model("mamba2", hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=2),
        "llama": tiny_model("llama", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16),
    }


@pytest.fixture(scope="module")
def folders(
    teacher: PreTrainedModel, students: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    found = {}
    for name, model in {"teacher": teacher, **students}.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(0))


Build = Callable[..., Aligner]


@pytest.fixture
def build(folders: dict[str, Path], teacher: PreTrainedModel, students: dict[str, PreTrainedModel]) -> Build:
    """Build the aligner of one stage: `align` entries, and what else the stage has."""

    def built(*align: dict[str, Any], student: str = "mamba2", **stage: Any) -> Aligner:
        # A copy, because tests train it.
        model = type(students[student])(students[student].config).eval()
        model.load_state_dict(students[student].state_dict())
        plan = plan_of(folders, *align, student=student, **stage)
        return Aligner(plan, teacher=teacher, student=model)

    return built


def plan_of(folders: dict[str, Path], *align: dict[str, Any], student: str = "mamba2", **stage: Any) -> Plan:
    mapping = {
        "version": 1,
        "teacher": {"model": str(folders["teacher"])},
        "student": {"model": str(folders[student])},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [{"name": "one", "steps": 10, "train": ["all"], "align": list(align), **stage}],
    }
    # Through JSON, whose lists a strict model takes as tuples.
    return make_plan(MappingFile.model_validate_json(json.dumps(mapping)))


def entry(tap: str = "hidden", layers: Any = "uniform", name: str = "e", **more: Any) -> dict[str, Any]:
    return {"name": name, "tap": tap, "layers": layers, **more}


def both(aligner: Aligner, teacher: PreTrainedModel, ids: Tensor, tap: str, pair: tuple[int, int]) -> tuple[Any, Any]:
    own = trace(aligner.student, ids, taps=[tap], layers=[pair[0]])[tap][pair[0]]
    return own, trace(teacher, ids, taps=[tap], layers=[pair[1]])[tap][pair[1]]


# uniform, 2 student blocks on 4: block 0 learns from 1, block 1 from 3.
PAIRS = ((0, 1), (1, 3))


@pytest.mark.parametrize("kind", ["cka", "gram"])
def test_similarity_losses_are_those_of_the_features(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor, kind: str
) -> None:
    aligner = build(entry(loss={"kind": kind, "weight": 0.5}))
    assert len(aligner.projectors) == 0
    compare = cka_loss if kind == "cka" else gram_loss
    expected = sum(compare(*both(aligner, teacher, input_ids, "hidden", p), normaliser=TOKENS) for p in PAIRS)
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
        expected = expected + relation_loss(own, target, normaliser=TOKENS)
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
                [cka_loss(*both(aligner, teacher, input_ids, "hidden", (i, j)), normaliser=TOKENS) for j in range(4)]
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
        assert [site.layer for site in aligner.sites(step)] == list(dict.fromkeys(layer for _, layer, _ in drawn))
    seen = {aligner.sites(step) for step in range(10)}
    assert len(seen) > 1
    differing = next(step for step in range(10) if aligner.sites(step) != aligner.sites(0))
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
        assert any(site.tap == "hidden" for site in aligner.sites(step)) == (factor > 0)
        torch.testing.assert_close(parts["tokens"], (2 - step / 10) * plain["tokens"])


def norm_of(aligner: Aligner, ids: Tensor, only: str) -> float:
    """The norm on the student of the gradient of one entry's share of the loss."""
    entries = aligner.entries
    aligner.entries = tuple(entry for entry in entries if entry.align.name == only)
    loss = aligner(ids).loss
    aligner.entries = entries
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
    for _ in range(aligner.balance.observations):
        assert not aligner.balance.done
        aligner(input_ids).loss.backward()
    assert aligner.balance.done
    # The student did not change in between, so the scale is the exact ratio; float32 sums differ in their last digits.
    assert norm_of(aligner, input_ids, "balanced") == pytest.approx(norm_of(aligner, input_ids, "anchor"), rel=1e-4)
    assert aligner.balance.scale("balanced") != 1


def test_the_gradient_while_balancing_is_that_of_the_balanced_loss(build: Build, input_ids: Tensor) -> None:
    align = (
        entry(name="anchor", loss={"kind": "mse"}),
        entry(name="balanced", tap="mixer_output", loss={"kind": "mse", "weight": "auto"}),
    )
    aligner, after = build(*align), build(*align)
    after.load_state_dict(aligner.state_dict())
    output = aligner(input_ids)
    output.loss.backward()
    after.balance = aligner.balance
    assert after.balance is not None
    for _ in range(after.balance.observations - 1):
        assert not after.balance.done
        after(input_ids).loss.backward()
    after.zero_grad()
    later = after(input_ids)
    later.loss.backward()
    torch.testing.assert_close(output.loss, later.loss)
    for (name, first), (_, second) in zip(aligner.named_parameters(), after.named_parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(first.grad, second.grad, msg=lambda text, name=name: f"{name}: {text}")


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


def rows(count: int) -> tuple[Tensor, ...]:
    ids = torch.randint(2, 97, (count, 16), generator=torch.Generator().manual_seed(7))
    return ids.split(2)


def test_projectors_start_as_the_ridge_regression_of_calibration_text(build: Build, teacher: PreTrainedModel) -> None:
    aligner = build(entry())
    assert tokens_to_prepare(aligner) >= 4 * 32
    assert prepare(aligner, rows(24)) == []
    ids = torch.cat(rows(24))
    for student, layer in PAIRS:
        own, target = (
            side[:, FIRST_TOKENS:].flatten(0, 1).double().detach()
            for side in both(aligner, teacher, ids, "hidden", (student, layer))
        )
        moments = own.T @ own / len(own)
        penalty = 1e-3 * moments.diagonal().mean() * torch.eye(32, dtype=torch.float64)
        expected = torch.linalg.solve(moments + penalty, own.T @ target / len(own)).T
        torch.testing.assert_close(aligner.projectors[f"e-{student}"].weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_too_little_text_leaves_auto_at_random_and_refuses_a_form_by_name(build: Build) -> None:
    aligner = build(entry())
    before = {name: tensor.clone() for name, tensor in aligner.projectors.state_dict().items()}
    notices = prepare(aligner, rows(2))
    assert "at random" in notices[0]
    assert "128" in notices[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in aligner.projectors.state_dict().items())
    with pytest.raises(UsageError, match=r"projector of e\.0: ridge") as error:
        prepare(build(entry(projector={"kind": "linear", "initialise": "ridge"})), rows(2))
    assert "33" in str(error.value.allowed)


def test_a_shared_projector_is_fitted_to_all_its_pairs(build: Build, teacher: PreTrainedModel) -> None:
    aligner = build(entry(projector={"kind": "orthogonal", "share": True, "initialise": "procrustes"}))
    prepare(aligner, rows(24))
    ids = torch.cat(rows(24))
    cross = torch.zeros(64, 32, dtype=torch.float64)
    for pair in PAIRS:
        own, target = (
            side[:, FIRST_TOKENS:].flatten(0, 1).double().detach()
            for side in both(aligner, teacher, ids, "hidden", pair)
        )
        cross += target.T @ own
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    projector = aligner.projectors["e"]
    assert isinstance(projector, Projector)
    torch.testing.assert_close(projector.matrix().double(), left @ right, rtol=1e-4, atol=1e-5)


def test_standardised_features_use_the_teachers_statistics(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry(loss={"kind": "huber", "standardise": True}))
    with pytest.raises(UsageError, match="statistics of calibration text"):
        aligner(input_ids)
    prepare(aligner, rows(24))
    ids = torch.cat(rows(24))
    expected = torch.zeros(())
    for pair in PAIRS:
        seen = both(aligner, teacher, ids, "hidden", pair)[1][:, FIRST_TOKENS:].flatten(0, 1).double()
        standardiser = Standardiser(seen.mean(0).float(), seen.std(0, correction=0).float())
        own, target = both(aligner, teacher, input_ids, "hidden", pair)
        projector = aligner.projectors[f"e-{pair[0]}"]
        assert isinstance(projector, Projector)
        z, t = (standardiser.apply(side) for side in (projector(own), target))
        expected = expected + torch.nn.functional.huber_loss(z, t)
    torch.testing.assert_close(aligner(input_ids).loss, expected, rtol=1e-4, atol=1e-6)


def test_a_standardised_relative_error_is_divided_by_the_standardised_energy(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry(layers=[{"student": 0, "teacher": 2}], loss={"kind": "relative_mse", "standardise": True}))
    prepare(aligner, rows(24))
    constants = aligner.entries[0].matches[0].fitted
    standardiser = Standardiser(constants["mean"], constants["deviation"])
    own, target = both(aligner, teacher, input_ids, "hidden", (0, 2))
    projector = aligner.projectors["e-0"]
    assert isinstance(projector, Projector)
    z, t = standardiser.apply(projector(own)), standardiser.apply(target)
    torch.testing.assert_close(aligner(input_ids).loss, (z - t).square().sum() / t.square().sum(), rtol=1e-4, atol=1e-6)


def test_heads_are_assigned_on_calibration_text(teacher: PreTrainedModel, folders: dict[str, Path]) -> None:
    """A student whose heads are the teacher's in another order gets that order back."""
    order = torch.tensor([2, 3, 0, 1])
    student = tiny_model("llama", num_hidden_layers=4)
    student.load_state_dict(teacher.state_dict())
    for block in student.model.layers:
        attention = block.self_attn
        with torch.no_grad():
            attention.q_proj.weight.copy_(attention.q_proj.weight.view(4, 16, -1)[order].flatten(0, 1))
            attention.k_proj.weight.copy_(attention.k_proj.weight.view(2, 16, -1)[[1, 0]].flatten(0, 1))
    align = entry("mixing", [{"student": 1, "teacher": 1}], loss={"kind": "mixing", "heads": "assignment"})
    plan = plan_of({**folders, "same": folders["teacher"]}, align, student="same")
    aligner = Aligner(plan, teacher=teacher, student=student)
    prepare(aligner, rows(8))
    # Its block 0 permutes what block 1 sees, so only the matrices' likeness can tell.
    heads = aligner.entries[0].matches[0].fitted["heads"]
    assert heads.sum(1).tolist() == [1, 1, 1, 1]
    assert heads.argmax(1).tolist() == order.tolist()


def test_learned_heads_start_even_and_move_to_the_likeliest(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(
        entry("mixing", loss={"kind": "mixing", "heads": "learned"}), student="llama", optimizer={"lr": 1e-3}
    )
    heads: Any = aligner.projectors["e-0-heads"]
    assert torch.equal(heads.weights().detach(), torch.full((2, 4), 0.25))
    output = aligner(input_ids)
    assert "e.0-heads" in output.parts
    output.loss.backward()
    assert heads.logits.grad is not None
    assert float(heads.logits.grad.abs().max()) > 0


def test_a_converted_student_shares_the_teachers_dimensions(
    teacher: PreTrainedModel, folders: dict[str, Path], input_ids: Tensor
) -> None:
    mapping = {
        "version": 1,
        "teacher": {"model": str(folders["teacher"])},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [
            {
                "name": "one",
                "steps": 1,
                "train": ["all"],
                "align": [entry(layers=[{"student": 2, "teacher": 2}], loss={"kind": "cka", "standardise": True})],
            }
        ],
    }
    plan = make_plan(MappingFile.model_validate_json(json.dumps(mapping)))
    aligner = Aligner(plan, teacher=teacher, student=convert(teacher, replace=[1]))
    prepare(aligner, rows(24))
    constants = aligner.entries[0].matches[0].fitted
    standardiser = Standardiser(constants["mean"], constants["deviation"])
    own, target = both(aligner, teacher, input_ids, "hidden", (2, 2))
    expected = cka_loss(own, target, normaliser=TOKENS, standardiser=standardiser, shared_basis=True)
    torch.testing.assert_close(aligner(input_ids).loss, expected)


def test_a_feature_loss_with_a_projector_is_as_it_was(
    build: Build, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    aligner = build(entry(layers=[{"student": 1, "teacher": 0, "weight": 3.0}, {"student": 1, "teacher": 2}]))
    expected = torch.zeros(())
    for layer, share in ((0, 0.75), (2, 0.25)):
        own, target = both(aligner, teacher, input_ids, "hidden", (1, layer))
        projector = aligner.projectors[f"e-1-{layer}"]
        assert isinstance(projector, Projector)
        loss = feature_loss("normalised_mse", own, target, normaliser=TOKENS, projector=projector)
        expected = expected + share * loss
    torch.testing.assert_close(aligner(input_ids).loss, expected)
