"""Every row of docs/families.md, run: what it claims works on a tiny model, what it refuses raises what it says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import ConversionError, TapError
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.convert import IN_PLACE, convert
from xarch_kd.models.conversion.epsilon import with_epsilon
from xarch_kd.models.conversion.frozen_parameters import frozen_parameters
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.conversion.teacher_spec import REFUSALS, SPECS
from xarch_kd.models.in_place.teachers import IN_PLACE_TEACHERS
from xarch_kd.models.mamba_ssm.config import EPSILON
from xarch_kd.models.mamba_ssm.format import export_mamba_ssm, import_mamba_ssm
from xarch_kd.taps.families import FAMILIES
from xarch_kd.taps.layout import Layout, layout_of
from xarch_kd.taps.sites import TAPS, WHOLE_TAPS
from xarch_kd.taps.trace import trace
from xarch_kd.testing.families import (
    CONVERSIONS,
    SPECIMENS,
    ConversionSupport,
    Row,
    in_short,
    readable_layers,
    row_of,
    token_ids,
)
from xarch_kd.testing.families_page import PAGE, page

# Composite models: their text parts have a row of their own.
WITHOUT_ROW = {"gemma3"}
ATTENTION = "attention"


@functools.cache
def row(name: str) -> Row:
    return row_of(SPECIMENS[name])


@functools.cache
def layout(name: str) -> Layout:
    """The layout of the row's model; tests leave the model as it is."""
    return layout_of(SPECIMENS[name].model())


def test_the_page_is_what_the_code_yields() -> None:
    assert PAGE.read_text() == page(lambda specimen: row(specimen.name)), "make docs writes it anew"


def test_every_type_that_the_code_knows_has_a_row() -> None:
    types = {specimen.model_type for specimen in SPECIMENS.values()}
    known = FAMILIES.keys() | SPECS.keys() | REFUSALS.keys() | IN_PLACE_TEACHERS.keys()
    assert known - types == WITHOUT_ROW


@pytest.mark.parametrize("name", SPECIMENS)
@torch.no_grad()
def test_the_taps_of_a_row(name: str) -> None:
    claimed = [tap for tap in TAPS if tap not in row(name).missing and tap not in ("mixing", "values")]
    found = trace(layout(name), token_ids(), taps=claimed)
    expected = (*token_ids().shape, layout(name).dim)
    for tap in claimed:
        values = [found[tap]] if tap in WHOLE_TAPS else found[tap].values()
        assert len(values) == (1 if tap in WHOLE_TAPS else len(layout(name).blocks))
        for value in values:
            assert value.shape == expected and bool(value.isfinite().all()), tap
            assert float(value.std()) > 0.0, tap
    norm: Any = layout(name).final_norm
    assert torch.equal(norm(found["hidden"][len(layout(name).blocks) - 1]), found["head_input"])


@pytest.mark.parametrize("name", [name for name in SPECIMENS if name == SPECIMENS[name].model_type])
def test_a_tap_that_a_row_lacks_raises_what_the_row_says(name: str) -> None:
    for tap, reason in row(name).missing.items():
        with pytest.raises(TapError) as caught:
            trace(layout(name), token_ids(), taps=[tap])
        assert reason in str(caught.value)


@pytest.mark.parametrize("name", SPECIMENS)
@torch.no_grad()
def test_the_mixing_of_a_row(name: str) -> None:
    kinds, reasons = layout(name).mixer_kinds, readable_layers(layout(name))
    assert {kinds[layer] for layer, reason in reasons.items() if reason is None} == row(name).mixings.keys()
    readable = [layer for layer, reason in reasons.items() if reason is None]
    for layer in readable:
        found = trace(layout(name), token_ids(), taps=["mixing", "values"], layers=[layer])
        mixing, values = found["mixing"][layer], found["values"][layer]
        assert mixing.kind == row(name).mixings[kinds[layer]]
        dense = mixing.dense()
        assert dense.shape == (2, mixing.heads, mixing.time, mixing.time)
        assert dense.triu(1).count_nonzero() == 0
        # Heads that share their keys share their values.
        values = values.repeat_interleave(mixing.heads // values.shape[2], dim=2)
        expected = torch.einsum("bhij,bjhd->bihd", dense, values)
        # Two orders of at most `time` products each, beside entries that are made in two ways themselves.
        bound = 4 * mixing.time * torch.finfo(dense.dtype).eps * float(dense.abs().sum(-1).max() * values.abs().max())
        assert float((mixing.apply(values) - expected).abs().max()) <= bound
        assert float(expected.abs().max()) > 100 * bound
    for layer, reason in reasons.items():
        if reason is not None:
            assert reason == row(name).unread[kinds[layer]]
            with pytest.raises(TapError) as caught:
                trace(layout(name), token_ids(), taps=["mixing"], layers=[layer])
            assert reason in str(caught.value)


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_conversions_of_a_row(name: str) -> None:
    assert row(name).conversions.keys() == {(mixer, one) for mixer, targets in CONVERSIONS.items() for one in targets}
    for (mixer, target), claimed in row(name).conversions.items():
        if claimed.fit is None:
            check_refused(name, claimed, mixer, target)
        else:
            check_converted(name, claimed, mixer, target)


def check_refused(name: str, claimed: ConversionSupport, mixer: str, target: str) -> None:
    """Check that the row's text is part of the message."""
    with pytest.raises(ConversionError) as caught:
        convert(layout(name).model, mixer=mixer, target=target, replace=[len(layout(name).blocks) - 1])
    assert claimed.reason == in_short(caught.value) and str(claimed.reason) in str(caught.value)


def check_converted(name: str, claimed: ConversionSupport, mixer: str, target: str) -> None:
    """Kept blocks are the teacher's, and with all of them kept the logits are."""
    teacher, replaced = layout(name).model, len(layout(name).blocks) - 1
    # What the conversion checks of itself is compared here.
    student = convert(teacher, mixer=mixer, target=target, replace=[replaced], check=False)
    check_student(student, claimed, mixer, target)
    assert_same(hidden_before(student, replaced), hidden_before(teacher, replaced), claimed, replaced)
    if claimed.all_kept is None:
        whole = convert(teacher, mixer=mixer, target=target, keep_attention="all", check=False)
        with torch.no_grad():
            assert_same(whole(token_ids()).logits, teacher(token_ids()).logits, claimed, replaced + 1)
        return
    with pytest.raises(ConversionError) as caught:
        convert(teacher, mixer=mixer, target=target, keep_attention="all")
    assert claimed.all_kept in str(caught.value)


def check_student(student: PreTrainedModel, claimed: ConversionSupport, mixer: str, target: str) -> None:
    """The class that was asked for, with the mixer in the last of the teacher's blocks, and frozen where it says so."""
    if target != IN_PLACE:
        assert student.config.model_type.removesuffix("_text") == target and TARGETS[target].mixer == mixer
    kinds = layout_of(student).mixer_kinds
    assert kinds[-1] == mixer and set(kinds[:-1]) == {ATTENTION}
    assert bool(frozen_parameters(student)) is (claimed.fit == "frozen")
    with torch.no_grad():
        assert bool(student(token_ids()).logits.isfinite().all())


@torch.no_grad()
def hidden_before(model: PreTrainedModel, layer: int) -> Tensor:
    """Return the outputs of the blocks before `layer`, [blocks, batch, time, dim]."""
    found = trace(model, token_ids(), taps=["hidden"], layers=range(layer))["hidden"]
    return torch.stack([found[index] for index in range(layer)])


def assert_same(found: Tensor, expected: Tensor, claimed: ConversionSupport, blocks: int) -> None:
    """Bit for bit where a row says exact, else within what rounding makes of it."""
    if claimed.fit == "exact":
        assert torch.equal(found, expected)
    else:
        bound = logits_tolerance(float(expected.abs().max()), blocks, expected.dtype)
        assert float((found - expected).abs().max()) <= bound


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_export_of_a_row(name: str, tmp_path: Path) -> None:
    claimed, model = row(name).export, layout(name).model
    if claimed.by_way_of is not None:
        replaced = [len(layout(name).blocks) - 1]
        if claimed.rescaled is not None:
            with pytest.raises(ConversionError) as caught:
                export_mamba_ssm(convert(model, target=claimed.by_way_of, replace=replaced), tmp_path / "refused")
            assert claimed.rescaled in str(caught.value)
            model = with_epsilon(model, EPSILON)
        model = convert(model, target=claimed.by_way_of, replace=replaced)
    if claimed.reason is not None:
        with pytest.raises(ConversionError) as caught:
            export_mamba_ssm(model, tmp_path / "refused")
        assert claimed.reason in str(caught.value)
        return
    back = import_mamba_ssm(export_mamba_ssm(model, tmp_path / "student"))
    with torch.no_grad():
        found, expected = back(token_ids()).logits, model(token_ids()).logits
    # The multipliers of a GraniteMoeHybrid are folded into the exported weights.
    bound = logits_tolerance(float(expected.abs().max()), len(layout(name).blocks), expected.dtype)
    assert torch.equal(found, expected) or (is_folded(model) and float((found - expected).abs().max()) <= bound)


def is_folded(model: PreTrainedModel) -> bool:
    config: Any = model.config
    if config.model_type != "granitemoehybrid":
        return False
    own = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (config.residual_multiplier, config.attention_multiplier) != (1.0, own**-0.5)
