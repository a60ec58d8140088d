"""Effects of new mixers, against whole students that are converted with the same blocks replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import xarch_kd as xkd
from xarch_kd.calibration.recall_rows import recall_rows
from xarch_kd.calibration.sensitivity import mixer_pool, scored_layers
from xarch_kd.calibration.substitution import SubstitutedTeacher, window_mask
from xarch_kd.errors import DataError, TapError, UsageError
from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.schema import ConversionOptions
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.tiny import VOCABULARY, tiny_model

TEXT = torch.randint(1, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
COMPARED = torch.zeros(TEXT.shape, dtype=torch.bool).index_fill_(1, torch.tensor([4, 6, 15]), True)
RECALL = recall_rows(range(1, VOCABULARY), TEXT, copying=2, lists=1, longest=None, seed=3)


def substituted(model_type: str, mixer: str, **sizes: int) -> tuple[PreTrainedModel, SubstitutedTeacher]:
    teacher = tiny_model(model_type, **sizes)
    pool = mixer_pool(teacher, ConversionOptions(mixer=mixer, replace=(0,)), seed=0)  # type: ignore[arg-type]
    return teacher, SubstitutedTeacher(layout_of(teacher), pool, TEXT, COMPARED, RECALL)


@torch.no_grad()
def expected_kl(teacher: PreTrainedModel, mixer: str, replaced: Collection[int]) -> tuple[Tensor, PreTrainedModel]:
    student = xkd.convert(teacher, mixer=mixer, replace=list(replaced))
    own, other = (torch.log_softmax(model(TEXT).logits.double(), -1)[COMPARED] for model in (teacher, student))
    return (own.exp() * (own - other)).sum(-1), student


# OLMo Hybrid requires attention somewhere, so that two students make the pool.
@pytest.mark.parametrize(("model_type", "mixer"), [("granite", "mamba2"), ("olmo2", "gated_delta")])
@torch.no_grad()
def test_one_new_mixer_and_several(model_type: str, mixer: str) -> None:
    teacher, found = substituted(model_type, mixer)
    for effect, replaced in ((found.exchanged(1), [1]), (found.effect([0, 2]), [0, 2])):
        wanted, student = expected_kl(teacher, mixer, replaced)
        # Both sum the same float32 products in other orders.
        torch.testing.assert_close(effect.kl.double(), wanted, rtol=2e-3, atol=1e-5)
        assert float(wanted.mean()) > 1e-3
        logits = student(RECALL.input_ids).logits
        for mask, nll in ((RECALL.copies, effect.copy_nll), (RECALL.values, effect.value_nll)):
            targets = RECALL.input_ids.roll(-1, 1)[mask]
            torch.testing.assert_close(
                nll, nn.functional.cross_entropy(logits[mask], targets, reduction="none"), rtol=1e-3, atol=1e-4
            )
    assert float(found.own.kl.abs().max()) < 1e-5


def test_another_base() -> None:
    _, found = substituted("llama", "mamba2")
    wanted = found.effect([2])
    found.rebase([1, 2])
    torch.testing.assert_close(found.exchanged(1).kl, wanted.kl)
    torch.testing.assert_close(found.exchanged(0).kl, found.effect([0, 1, 2]).kl)


@torch.no_grad()
def test_a_window_of_attention() -> None:
    teacher, found = substituted("llama", "mamba2")
    # A window as long as the rows of 16 tokens is the teacher itself; recall rows are longer.
    assert float(found.windowed(1).kl.abs().max()) < 1e-5
    assert float((found.windowed(1).copy_nll - found.own.copy_nll).abs().max()) > 1e-4
    # Against the model's own attention with the mask of one layer, through a hook.
    mask = window_mask(RECALL.input_ids.shape[1])
    attention = teacher.model.layers[1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )
    logits = teacher(RECALL.input_ids).logits[RECALL.copies]
    hook.remove()
    wanted = nn.functional.cross_entropy(logits, RECALL.input_ids.roll(-1, 1)[RECALL.copies], reduction="none")
    torch.testing.assert_close(found.windowed(1).copy_nll, wanted, rtol=1e-4, atol=1e-5)
    assert [int((row == 0).sum()) for row in window_mask(40)[0, 0][[0, 10, 31, 39]]] == [1, 11, 32, 36]


@pytest.mark.parametrize("strategy", ["one_in", "greedy"])
def test_other_strategies(strategy: str) -> None:
    _, found = substituted("llama", "mamba2")
    options = LayerStrategy.model_validate({"strategy": strategy, "budget": 2})
    scored = scored_layers(found, options, "replace", reporter=Reporter.silent())
    kl = {replaced: float(found.effect(replaced).kl.mean()) for replaced in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))}
    (kept,) = [layer.layer for layer in scored if layer.kept]
    if strategy == "one_in":
        whole = float(found.effect((0, 1, 2)).kl.mean())
        expected = [whole - kl[1, 2], whole - kl[0, 2], whole - kl[0, 1]]
        assert [layer.kl for layer in scored] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert kept == expected.index(max(expected))
    if strategy == "greedy":
        first = min(range(3), key=lambda layer: kl[layer,])
        # One of the two others is measured again beside the first, the cheaper one alone.
        second = min({0, 1, 2} - {first}, key=lambda layer: kl[layer,])
        assert kept == ({0, 1, 2} - {first, second}).pop()
        assert scored[second].kl == pytest.approx(kl[min(first, second), max(first, second)] - kl[first,], rel=1e-3)


def test_gates_need_the_attention_where_the_new_mixer_is_another() -> None:
    teacher = tiny_model("llama")
    pool = mixer_pool(teacher, ConversionOptions(mixer="mamba2", replace=(0,)), seed=0)
    # The new block 1 is the teacher's own, so that its share changes nothing.
    found = SubstitutedTeacher(layout_of(teacher), {**pool, 1: layout_of(teacher)}, TEXT, COMPARED, RECALL)
    shares = torch.tensor([0.3, 0.6, 0.8], requires_grad=True)
    (gradient,) = torch.autograd.grad(found.gated_divergence(shares, "both"), [shares])
    assert float(found.gated_divergence(torch.ones(3), "both").detach()) == pytest.approx(0, abs=1e-5)
    nothing = float(found.gated_divergence(torch.zeros(3), "kl").detach())
    assert nothing == pytest.approx(float(found.effect([0, 2]).kl.mean()), rel=1e-4)
    step = 0.01 * torch.eye(3)
    moved = [[shares.detach() + sign * one for one in step] for sign in (1, -1)]
    up, down = ([found.gated_divergence(each, "both").detach() for each in side] for side in moved)
    slopes = [float(high - low) / 0.02 for high, low in zip(up, down, strict=True)]
    assert gradient.tolist() == pytest.approx(slopes, rel=0.02, abs=2e-4)
    options = LayerStrategy(strategy="gates", budget=1, steps=30)
    scored = scored_layers(found, options, "replace", reporter=Reporter.silent())
    assert [layer.kept for layer in scored] == [True, False, True]
    assert scored[1].rank == 3
    assert all(layer.gate is not None and 0 < layer.gate < 1 for layer in scored)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_window_needs_longer_rows() -> None:
    _, found = substituted("llama", "mamba2")
    options = LayerStrategy.model_validate({"strategy": "window", "budget": 2})
    with pytest.raises(DataError, match="A window changes nothing in rows"):
        scored_layers(found, options, "replace", reporter=Reporter.silent())


def test_a_model_that_is_more_than_its_blocks_is_refused() -> None:
    teacher = tiny_model("llama")
    layout = dataclasses.replace(layout_of(teacher), final_norm=nn.Identity())
    with pytest.raises(TapError, match="run one after another do not give what the model gives"):
        SubstitutedTeacher(layout, {}, TEXT, COMPARED, RECALL)


def test_recalled_tokens_follow_from_earlier_ones() -> None:
    rows = recall_rows(range(1, 500), TEXT, copying=1, lists=1, longest=None, seed=0)
    assert rows.input_ids.shape == (2, 112)
    copied, listed = rows.input_ids
    assert torch.equal(copied[:48], copied[64:])
    assert rows.copies[0].nonzero().flatten().tolist() == list(range(64, 111))
    assert torch.equal(copied[48:64], TEXT.flatten()[:16])
    pairs = {tuple(pair[:2]): tuple(pair[2:]) for pair in listed[:56].view(-1, 4).tolist()}
    assert len(pairs) == 14
    asked = [tuple(pair) for pair in listed[56:].view(-1, 4).tolist()]
    assert all(pairs[pair[:2]] == pair[2:] for pair in asked)
    assert [pair[:2] for pair in asked] != list(pairs)
    places = rows.values[1].nonzero().flatten() + 1
    assert listed[places].tolist() == [token for pair in asked for token in pair[2:]]
    assert not rows.values[0].any()
    assert not rows.copies[1].any()


def test_recall_fits_the_positions_of_the_model() -> None:
    assert recall_rows(range(1, 500), TEXT, copying=1, lists=1, longest=60, seed=0).input_ids.shape == (2, 56)
    with pytest.raises(UsageError, match="Recall cannot be measured"):
        recall_rows(range(1, 500), TEXT, copying=1, lists=1, longest=12, seed=0)
