"""Prefix sources while a stage trains: shares, schedules, ranks, adaptation and collapse, without a training run."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.errors import RolloutCollapse
from xarch_kd.mapping_file.prefixes import PRESETS, Prefixes, prefix_settings
from xarch_kd.run.processes import Processes
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.prefixes import PrefixMixture

STEPS = 100


def mixture(settings: dict[str, Any] | str, *, rank: int = 0, ranks: int = 1, steps: int = STEPS) -> PrefixMixture:
    """The prefixes of a stage whose student and teacher are tiny models."""
    teacher, student = tiny_model("llama"), tiny_model("mamba2", seed=1)
    aligner: Any = SimpleNamespace(
        student=student,
        reader=SimpleNamespace(layout=SimpleNamespace(model=teacher)),
        stage=SimpleNamespace(index=1, steps=steps, batch_size=3, stage=SimpleNamespace(name="mixed")),
        autocast=lambda device: nullcontext(),
    )
    return PrefixMixture(
        prefix_settings(settings) if isinstance(settings, str) else Prefixes.model_validate(settings),  # type: ignore[arg-type]
        aligner,
        seed=0,
        row_tokens=12,
        end_of_sequence=[0],
        processes=Processes(rank=rank, world_size=ranks),
    )


def batch() -> Batch:
    return Batch(input_ids=torch.arange(1, 37).reshape(3, 12), origin="text")


def alone(values: Tensor) -> Tensor:
    return values


def test_any_run_of_micro_batches_has_its_sources_in_proportion() -> None:
    mixed = mixture({"data": 0.5, "student": 0.3, "teacher": 0.2})
    for first, count in ((0, 10), (37, 100), (500, 1000)):
        drawn = [mixed.source_of(index, 0) for index in range(first, first + count)]
        for name, share in (("data", 0.5), ("student", 0.3), ("teacher", 0.2)):
            # The discrepancy of multiples of the golden ratio grows with the logarithm of their number.
            assert abs(drawn.count(name) - share * count) <= 1 + math.log(count)


@pytest.mark.parametrize(
    ("kind", "way"),
    [("linear", lambda share: share), ("cosine", lambda share: (1 - math.cos(math.pi * share)) / 2)],
    ids=["linear", "cosine"],
)
def test_the_mixture_and_the_horizon_follow_their_schedules(kind: str, way: Any) -> None:
    mixed = mixture(
        {
            "data": 0.9,
            "student": {"share": 0.1, "max_new_tokens": 200},
            "schedule": {"kind": kind, "start": 0.2, "end": 0.6, "to": {"student": 0.6, "teacher": 0.4}},
            "horizon": {"kind": kind, "initial": 0.1, "end": 0.5},
        }
    )
    for step in (0, 20, 30, 45, 60, 99):
        passed = way(min(max((step / STEPS - 0.2) / 0.4, 0), 1))
        expected = {"data": 0.9 * (1 - passed), "student": 0.1 + 0.5 * passed, "teacher": 0.4 * passed}
        assert mixed.mixture(step) == pytest.approx(expected)
        grown = 200 * (0.1 + 0.9 * way(min(step / STEPS / 0.5, 1)))
        assert mixed.horizon("student", 3, step) == math.ceil(grown - 1e-9) or grown % 1 < 1e-9
    # A teacher without a length of its own fills the row of 12 tokens.
    assert mixed.horizon("teacher", 3, 99) == 9


def test_adaptive_moves_only_when_the_metric_rises_by_the_tolerance() -> None:
    mixed = mixture("distillm")
    for metric, moved in ((2.0, 0.0), (1.5, 0.0), (2.05, 0.0), (2.1, 0.1), (2.15, 0.1), (2.2, 0.2)):
        mixed.observe(metric)
        assert mixed.mixture(3) == pytest.approx({"data": 1 - moved, "student": moved, "teacher": 0.0})


def test_ranks_agree_on_the_source_and_sample_together_what_one_process_samples() -> None:
    settings = {"data": 0.2, "student": 0.5, "teacher": 0.3}
    whole, parts = mixture(settings), [mixture(settings, rank=rank, ranks=2) for rank in range(2)]
    for step in range(4):
        expected, found = whole.own_rows(batch(), step), [part.own_rows(batch(), step) for part in parts]
        assert expected.origin == found[0].origin == found[1].origin
        for row in range(3):
            own = found[row % 2]
            mask = own.attention_mask
            length = own.time if mask is None else int(mask[row // 2].sum())
            assert own.input_ids[row // 2, :length].tolist() == expected.input_ids[row, :length].tolist()
            assert expected.attention_mask is None or int(expected.attention_mask[row].sum()) == length
    sums = [torch.zeros(13, dtype=torch.float64)]
    for part in parts:
        part.settle(0, lambda values: sums.append(sums.pop() + values) or values)  # type: ignore[func-returns-value]
    counted = whole.settle(0, alone)
    assert sums[0][0] == counted.tokens
    assert sums[0][2] == counted.rollouts["student"].tokens


def test_replayed_rows_are_rows_that_were_sampled_before() -> None:
    mixed = mixture({"student": 1.0, "replay": {"capacity": 6, "fresh": 0.5}})
    seen: set[tuple[int, ...]] = set()
    replayed = 0
    for step in range(8):
        batch_rows = mixed.own_rows(batch(), step)
        # Without padding, whose length depends on the rows beside it.
        kept = batch_rows.input_ids.ne(0)
        rows = {tuple(row[mask].tolist()) for row, mask in zip(batch_rows.input_ids, kept, strict=True)}
        if mixed.settle(step, alone).replayed:
            replayed += 1
            assert rows <= seen
        seen |= rows
    assert 1 <= replayed <= 7


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_repeating_student_warns_once_or_stops(action: str) -> None:
    mixed = mixture(
        {
            "student": {"share": 1.0, "temperature": 0},
            "collapse": {"distinct_4": 0.5, "window": 2, "action": action},
        }
    )
    # Greedy decoding without a preference repeats token 0, which does not end a row here.
    torch.nn.init.zeros_(mixed.aligner.student.get_output_embeddings().weight)  # type: ignore[union-attr, arg-type, operator]
    mixed.end_of_sequence = ()
    found = []
    for step in range(4):
        mixed.own_rows(batch(), step)
        mixed.settle(step, alone)
        if action == "stop" and step == 1:
            with pytest.raises(RolloutCollapse, match=r"distinct-4 is 0\.17, below 0\.5"):
                mixed.collapse()
            return
        found.append(mixed.collapse())
    assert [text is None for text in found] == [True, False, True, True]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_settings(name: str) -> None:
    assert prefix_settings(name).model_dump(exclude={"preset"}) == Prefixes.model_validate(PRESETS[name]).model_dump(  # type: ignore[arg-type]
        exclude={"preset"}
    )
