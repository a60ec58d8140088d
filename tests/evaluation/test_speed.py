"""Suite `speed`: bytes, times, what is left out, and the forms of its result."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.evaluation import speed_suite
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.results import Evaluation, from_json, render, render_markdown, to_json
from xarch_kd.evaluation.speed_suite import ContextFigures, ModelFigures, SpeedResult, faster_from
from xarch_kd.evaluation.timing import STEPS, Side, Timing
from xarch_kd.mapping_file.schema import Speed
from xarch_kd.models.cache_size import LayerCache
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.families import SPECIMENS
from xarch_kd.testing.tiny import tiny_model


def measured(student: PreTrainedModel, reporter: Reporter | None = None, **settings: Any) -> SpeedResult:
    evaluation = compare_models(
        tiny_model("llama"), student, {}, suites=["speed"], speed=Speed(**settings), reporter=reporter
    )
    assert evaluation.likelihood == () and evaluation.speed is not None
    return evaluation.speed


def shown(evaluation: Evaluation) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(render(evaluation))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bytes_come_without_times_up_to_the_last_position() -> None:
    evaluation = compare_models(tiny_model("llama"), tiny_model("bamba"), {}, suites=["speed"])
    result = evaluation.speed
    assert result is not None and result.timed == () and result.dtype == "bfloat16"
    (context,) = result.contexts
    assert context.tokens == 256
    # Keys and values of 2 heads × 16 in three layers; one such layer, and two of 4 × 16 × 16 and 192 × 4.
    teacher, student = 256 * 3 * 128, 256 * 128 + 2 * (4 * 1024 + 2 * 768)
    assert (context.teacher.cache_bytes, context.student.cache_bytes) == (teacher, student)
    assert (context.teacher.batch, context.student.batch) == (2**30 // teacher, 2**30 // student)
    assert result.smaller_from == 2 * (4096 + 1536) // 256 + 1
    assert result.notices == ("left out: 1,024, 4,096, 16,384, 65,536 tokens, beyond the 512 positions",)
    assert from_json(to_json(evaluation)) == evaluation
    text, card = shown(evaluation), render_markdown(evaluation)
    for page in (text, card):
        assert "96 KiB → 43 KiB" in page and "from 45 tokens of context" in page and "times: not measured" in page
    assert f"| 256 | 96 KiB → 43 KiB | {2**30 // teacher:,} → {2**30 // student:,} |" in card


def test_both_models_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    original = Side._run

    def recorded(side: Side, ids: torch.Tensor, cache: Any, start: int) -> Any:
        order.append((side.name, ids.shape[1]))
        return original(side, ids, cache, start)

    monkeypatch.setattr(Side, "_run", recorded)
    printed = io.StringIO()
    reporter = Reporter(Console(file=printed, width=200))
    result = measured(tiny_model("bamba"), reporter, lengths=(24, 40), seconds=60, dtype="float32")
    assert printed.getvalue().startswith("timing prefill and decoding of both models after 24, 40 tokens: about")
    turns = [name for name, tokens in order if tokens == 40]
    assert turns == ["teacher", "student", "student", "teacher", *turns[4:]] and len(turns) == 2 * 5
    decoded = [name for name, tokens in order[order.index(("teacher", 40)) :] if tokens == 1]
    assert decoded[:4] == ["teacher", "student", "student", "teacher"] and len(decoded) == 2 * (STEPS + 1)
    assert [context.tokens for context in result.timed] == [24, 40]
    for context in result.timed:
        for figures in (context.teacher, context.student):
            assert figures.prefill is not None and figures.decode is not None
            assert (figures.prefill.repeats, figures.decode.repeats) == (5, STEPS)
            assert 0 < figures.decode.low <= figures.decode.median <= figures.decode.high
            assert figures.measured_bytes == figures.cache_bytes
            assert figures.peak_bytes is not None and figures.peak_bytes > 0
    assert "dtype:float32" in result.signature and f"threads:{torch.get_num_threads()}|" in result.signature
    assert result.notices == ()


@pytest.mark.parametrize("name", ["llama", "bamba", "granitemoehybrid", "mamba2", "qwen3_5_text"])
def test_decoding_continues_the_context(name: str) -> None:
    model = SPECIMENS[name].model()
    if hasattr(model.config, "time_step_limit"):
        # transformers ignores the limit of steps while it decodes.
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "time_step_limit": (0.0, float("inf"))}))
    side = Side("student", layout_of(model.eval()), torch.float32)
    ids = torch.randint(1, 90, (1, 20), generator=torch.Generator().manual_seed(1))
    _, token, cache = side.prefill(ids)
    for step in range(3):
        with torch.inference_mode():
            assert int(token) == int(side.model(ids, use_cache=False).logits[0, -1].argmax())
        ids = torch.cat([ids, token], 1)
        _, token = side.decode(token, cache, 20 + step)


def test_lengths_that_cost_more_than_their_seconds_are_named() -> None:
    result = measured(tiny_model("bamba"), lengths=(16, 400), seconds=1e-9)
    assert result.timed == () and result.decode_from is None
    assert len(result.notices) == 2 and result.notices[1].startswith("400 tokens are not timed: about ")
    assert "evaluate.speed.seconds" in result.notices[0]


def test_a_length_that_the_memory_does_not_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xarch_kd.evaluation.timing.MEMORY_SHARE", -1.0)
    result = measured(tiny_model("bamba"), lengths=(16,), seconds=60)
    assert result.timed == () and "GiB that are free" in result.notices[0]


def test_a_cache_of_another_size_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_suite, "cache_layers", lambda layout: (LayerCache(per_token=1),))
    result = measured(tiny_model("bamba"))
    assert result.notices[1] == "the teacher's cache of 32 tokens takes 12,288 bytes, not the 64 of its config"
    assert result.notices[2].startswith("the student's cache of 32 tokens takes 15,360 bytes")


def test_a_model_that_does_not_run_with_a_cache_is_reported() -> None:
    result = measured(SPECIMENS["rwkv"].model(), seconds=60)
    assert result.contexts[0].student == ModelFigures(cache_bytes=None, batch=None)
    assert result.contexts[0].teacher.cache_bytes is not None
    assert [line for line in result.notices if "RwkvForCausalLM returns no cache" in line]
    evaluation = Evaluation(teacher="T", student="S", level=0.95, resamples=1, seed=0, results={"speed": result})
    assert "96 KiB → ?" in shown(evaluation) and "cache is smaller" not in shown(evaluation)


def points(*differences: float) -> list[ContextFigures]:
    def of(seconds: float) -> ModelFigures:
        timing = Timing(median=seconds, low=seconds, high=seconds, repeats=1)
        return ModelFigures(cache_bytes=1, batch=1, decode=timing)

    return [
        ContextFigures(tokens=100 * (index + 1), teacher=of(10.0), student=of(10.0 + difference))
        for index, difference in enumerate(differences)
    ]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((), None),
        ((-1.0, -2.0), 100.0),
        ((1.0, 0.0), None),
        ((1.0, -1.0), 150.0),
        ((3.0, -1.0, -2.0), 175.0),
        ((-1.0, 1.0, -3.0), 225.0),
        ((-1.0, -1.0, 1.0), None),
    ],
)
def test_the_student_is_faster_from_where_it_stays_so(differences: tuple[float, ...], expected: float | None) -> None:
    assert faster_from(points(*differences), lambda figures: figures.decode) == expected


def test_a_table_with_times() -> None:
    contexts = points(1.0, -1.0)
    for index, figures in enumerate(contexts):
        timing = Timing(median=0.0334, low=0.03, high=0.04, repeats=3)
        both = [
            dataclasses.replace(each, prefill=timing, peak_bytes=2**20) for each in (figures.teacher, figures.student)
        ]
        contexts[index] = dataclasses.replace(figures, teacher=both[0], student=both[1])
    result = SpeedResult(
        signature="speed.v1|device:cpu",
        dtype="float32",
        memory=2**30,
        contexts=tuple(contexts),
        smaller_from=None,
        prefill_from=None,
        decode_from=150.0,
    )
    evaluation = Evaluation(teacher="T", student="S", level=0.95, resamples=1, seed=0, results={"speed": result})
    text = shown(evaluation)
    assert "33.4 ms → 33.4 ms" in text and "10.0 s → 9.0 s" in text and "1 MiB → 1 MiB" in text
    assert "the student's cache is smaller at no length up to 200 tokens" in text
    assert "its decoding is faster from about 150 tokens of context" in text
    assert "at most 30%" in text and "speed.v1|device:cpu" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (256, 1024)}, r"lengths: 1,024 is beyond the 512 positions of the teacher\. Use at most 512"),
        ({"memory_gib": 1e-5}, r"memory_gib: 10,737 bytes do not hold one sequence of 256 tokens: the teacher's cache"),
    ],
)
def test_settings_that_do_not_fit_the_models_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measured(tiny_model("bamba"), **settings)
