"""One order of batches and one feature cache over all stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import xarch_kd.teacher.reader as reader_module
from xarch_kd.errors import Interrupted, MappingFileError
from xarch_kd.job.train import train
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import same, signal_after, student_of

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


def stages(cache: str) -> list[dict[str, Any]]:
    return [{**MIXER_STAGE, "cache": cache}, {**LOGIT_STAGE, "cache": cache}]


@pytest.fixture
def write(write_mapping: Write, text_file: Path) -> Write:
    def written(cache: str, order: str = "shared") -> Path:
        data = {"files": [str(text_file)], "sequence_length": 16, "batch_size": 2, "order": order}
        return write_mapping(*stages(cache), data=data, name=f"{cache}-{order}.yaml")

    return written


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Number of rows of each pass of the teacher."""
    found: list[int] = []
    trace = reader_module.trace

    def counted(layout: Any, ids: Any, *given: Any, **named: Any) -> Any:
        found.append(len(ids))
        return trace(layout, ids, *given, **named)

    monkeypatch.setattr(reader_module, "trace", counted)
    yield found


def test_a_second_stage_pays_no_second_pass_and_all_ends_are_bitwise_the_same(
    write: Write, tmp_path: Path, passes: list[int]
) -> None:
    train(write("off"), tmp_path / "off")
    assert len(passes) == 7
    passes.clear()
    train(write("memory"), tmp_path / "memory")
    # The first stage has 3 batches, which the 3 steps of the second draw again.
    assert len(passes) == 3
    assert same(student_of(tmp_path / "memory"), student_of(tmp_path / "off"))
    for cache in ("memory", "disk"):
        run = tmp_path / f"stopped-{cache}"
        with signal_after(5), pytest.raises(Interrupted):
            train(write(cache), run)
        passes.clear()
        train(write(cache), run, resume=True)
        # One step is left; on the disk its features are still there.
        assert len(passes) == (1 if cache == "memory" else 0)
        assert same(student_of(run), student_of(tmp_path / "off"))
        assert not (run / "stages" / "features").exists()


def test_the_plan_counts_the_features_of_all_stages_once(write: Write) -> None:
    plan = make_plan(write("memory"), rates=RATES)
    own = make_plan(write("memory", "per_stage"), rates=RATES)
    # 3 batches of 2 × 16 tokens of float32: inputs and outputs of two mixers, and the head input, of dim 64 each.
    assert [stage.cache_bytes for stage in plan.stages] == [3 * 2 * 16 * 5 * 64 * 4, 0]
    assert [stage.cache_bytes for stage in own.stages] == [3 * 2 * 16 * 4 * 64 * 4, 3 * 2 * 16 * 64 * 4]
    assert plan.stages[1].flops < own.stages[1].flops
    assert plan.stages[0].flops == own.stages[0].flops


@pytest.mark.parametrize(
    ("data", "second", "message"),
    [
        ({}, {"cache": "disk"}, "all stages have one cache, and stage mixers keeps it in memory"),
        ({}, {"batch_size": 1}, "a cached batch of stage mixers has 2 rows, and one of this stage 1"),
        ({"packing": "none"}, {}, "order: shared needs rows of one length"),
        ({}, {"cache": {"limit_gib": 1e-4}}, "the cache of stages mixers, logits needs"),
    ],
    ids=["places", "batch-sizes", "packing", "limit"],
)
def test_caches_that_cannot_be_shared_are_refused(
    write_mapping: Write, text_file: Path, data: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    first, last = stages("memory")
    if isinstance(second.get("cache"), dict):
        # Enough for the features of each stage alone, 96 and 24 KiB.
        first = {**first, **second}
    path = write_mapping(
        first,
        {**last, **second},
        data={"files": [str(text_file)], "sequence_length": 16, "batch_size": 2, "order": "shared", **data},
    )
    with pytest.raises(MappingFileError) as caught:
        make_plan(path, rates=RATES)
    assert message in "\n".join(caught.value.problems)
