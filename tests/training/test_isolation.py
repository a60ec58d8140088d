"""Documents of an isolated row give the loss and the gradients that they give alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel

from tests.training.test_aligner import plan_of
from tests.training.test_micro_batches import _entry, _tokens, run, total
from xarch_kd.data.batches import Batch
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.length_groups import grouped_by_length
from xarch_kd.data.packing import pack
from xarch_kd.errors import TapError
from xarch_kd.models.conversion.convert import convert
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.isolation import keeps_documents_apart

LENGTHS = (5, 9, 3, 12, 7, 2)
TOKEN_WISE = {**_entry("hidden", "relative_mse"), **_tokens("forward_kl")}


def documents() -> TokenizedDocuments:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 97, (length,), generator=generator).tolist() for length in LENGTHS]
    return TokenizedDocuments.of(ids, [[place >= length // 3 for place in range(length)] for length in LENGTHS])


def packed_and_alone() -> tuple[Batch, list[Batch]]:
    """Return rows that isolate all documents, one of them padded, and each document as a batch of its own."""
    whole = documents()
    rows = pack(whole, 16, packing="best_fit", isolated=True)
    single = pack(whole, 16, packing="none")
    batch = rows.batch(range(len(rows)), origin="a test")
    assert batch.position_ids is not None and batch.attention_mask is not None and len(rows) < len(whole)
    return batch, [single.batch([number], origin="a test") for number in range(len(whole))]


def aligner_of(folder: Path, teacher: PreTrainedModel, stage: dict[str, Any], student: str) -> Aligner:
    own: PreTrainedModel = tiny_model("llama", seed=1)
    config: dict[str, Any] = {"model": str(folder)}
    if student != "llama":
        config = {"convert": {"mixer": student, "replace": [1]}}
        own = convert(teacher, mixer=student, replace=[1], check=False)  # type: ignore[arg-type]  # a literal
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "norm" in name:
                parameter.mul_(1.1)
    return Aligner(plan_of(folder, stage, **config), teacher=teacher, student=own)


@pytest.mark.parametrize(
    ("student", "stage", "reason"),
    [
        ("llama", TOKEN_WISE, None),
        ("llama", {**_entry("mixer_output", "mse"), "inputs": "teacher", "train": ["mixers"]}, None),
        ("llama", _entry("hidden", "gram"), "compares the tokens of a row with each other"),
        ("llama", _entry("mixing", "mixing"), "compares the tokens of a row with each other"),
        ("llama", _entry("values", "relation"), "compares the tokens of a row with each other"),
        ("mamba2", TOKEN_WISE, "mixers of kind mamba2"),
        ("mamba2", {**_entry("mixer_output", "mse", "replaced"), "inputs": "teacher", "train": ["mixers"]}, "mamba2"),
        ("gated_delta", TOKEN_WISE, "mixers of kind gated_delta"),
    ],
)
def test_an_isolated_row_gives_the_loss_of_its_documents_alone(
    teacher_folder: Path, teacher: PreTrainedModel, student: str, stage: dict[str, Any], reason: str | None
) -> None:
    aligner = aligner_of(teacher_folder, teacher, stage, student)
    batch, alone = packed_and_alone()
    parts = aligner.parts(batch)
    if reason is None:
        assert aligner.splitting_reason is None and parts == (batch,)
    else:
        assert aligner.splitting_reason is not None and reason in aligner.splitting_reason
        assert all(part.position_ids is None for part in parts)
    expected_outputs, expected = run(aligner, alone)
    outputs, found = run(aligner, list(parts))
    # Other shapes of the same products in float32.
    assert total(outputs) == pytest.approx(total(expected_outputs), rel=1e-5)
    assert found.keys() == expected.keys() and expected
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert max(float((found[name] - expected[name]).norm() / scale) for name in expected) < 1e-5
    # Read as one text, the same rows give another loss.
    joined = Batch(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert total(run(aligner, [joined])[0]) != pytest.approx(total(expected_outputs), rel=1e-3)


def test_a_recurrent_student_refuses_packed_rows_that_were_not_divided(
    teacher_folder: Path, teacher: PreTrainedModel
) -> None:
    aligner = aligner_of(teacher_folder, teacher, TOKEN_WISE, "mamba2")
    with pytest.raises(TapError, match=r"would be mixed[\s\S]*batch\.apart\(\)"):
        aligner(batch=packed_and_alone()[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_models_that_attend_to_single_documents_are_recognized(family: str) -> None:
    assert keeps_documents_apart(layout_of(tiny_model(family)))


def test_a_model_that_ignores_restarted_positions_is_recognized() -> None:
    model = tiny_model("llama").train()
    forward = model.model.forward

    def without_positions(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.model.forward = without_positions  # type: ignore[method-assign]
    assert not keeps_documents_apart(layout_of(model))
    assert model.training


def test_documents_apart_keep_their_tokens_and_labels() -> None:
    batch, alone = packed_and_alone()
    parts = batch.apart()
    rows = [
        (part.input_ids[row, :length].tolist(), part.next_tokens[row, :length].tolist())
        for part in parts
        for row, length in enumerate(part.attention_mask.sum(1).tolist() if part.attention_mask is not None else [])
    ]
    expected = [(one.input_ids[0].tolist(), one.next_tokens[0].tolist()) for one in alone]
    assert sorted(rows) == sorted(expected)
    assert alone[0].apart() == (alone[0],)


@pytest.mark.parametrize("cost", [0, 10, 1000])
def test_groups_of_lengths_have_the_smallest_cost(cost: int) -> None:
    """Against all ways to cut the sorted lengths."""
    lengths = numpy.random.default_rng(cost).integers(1, 60, size=9)
    groups = grouped_by_length(lengths, cost)
    assert sorted(item for group in groups for item in group.tolist()) == list(range(9))

    def price(parts: list[numpy.ndarray]) -> int:
        return sum(int(lengths[part].max()) * len(part) + cost for part in parts)

    order = numpy.argsort(lengths)
    cuts = [[at + 1 for at in range(8) if mask >> at & 1] for mask in range(256)]
    assert price(groups) == min(price(numpy.split(order, cut)) for cut in cuts)
