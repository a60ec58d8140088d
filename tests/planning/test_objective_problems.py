"""Problems of layer maps, projectors, losses, weights and schedules, with their place in the file."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xarch_kd.errors import MappingFileError
from xarch_kd.losses.schedules import WeightSchedule
from xarch_kd.planning.objective_checks import _turns
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.render import render_plan

PlanOf = Callable[[str], Plan]
FolderOf = Callable[..., str]

FILE = """\
version: 1
teacher: {{model: '{teacher}'}}
student: {{model: '{student}'}}
data: {{builtin: python-docs, sequence_length: 16, batch_size: 2}}
calibration: {{tokens: {calibration}}}
stages:
  - name: one
    steps: 10
    train: [all]
    inputs: {inputs}
    align:
      - name: e
        tap: {tap}
        {rest}
"""
MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 2, "expand": 2}
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "mamba2": ("mamba2", MAMBA2),
    "deep": ("llama", {"num_hidden_layers": 6}),
    "same": ("llama", {"num_hidden_layers": 4}),
}


@pytest.fixture
def content(folder_of: FolderOf) -> Callable[..., str]:
    def made(
        rest: str, *, student: str = "mamba2", tap: str = "hidden", inputs: str = "student", calibration: int = 256
    ) -> str:
        model_type, sizes = SIZES[student]
        return FILE.format(
            teacher=folder_of("llama", num_hidden_layers=4),
            student=folder_of(model_type, **sizes),
            rest=rest.replace("\n", "\n        "),
            tap=tap,
            inputs=inputs,
            calibration=calibration,
        )

    return made


PROBLEMS: list[tuple[dict[str, object], str, tuple[str, ...]]] = [
    ({"rest": "layers: [{student: 2, teacher: 1}]"}, "layers[0].student", ("2 is out of range", "0 to 1")),
    ({"rest": "layers: [{student: 1, teacher: 4}]"}, "layers[0].teacher", ("4 is out of range", "0 to 3")),
    ({"rest": "layers: [{student: 1, teacher: 1}, {student: 1, teacher: 1}]"}, "layers", ("twice: (1, 1)",)),
    ({"rest": "layers: []"}, "layers", ("empty",)),
    ({"rest": "layers: same"}, "layers", ("2 student layers, 4 teacher layers", "uniform")),
    ({"rest": "layers: replaced"}, "layers", ("2 student layers, 4 teacher layers",)),
    ({"rest": "layers: first", "student": "deep"}, "layers", ("6 student layers", "up to 4")),
    ({"rest": "layers: last", "student": "deep"}, "layers", ("6 student layers", "up to 4")),
    ({"rest": "layers: {strategy: every, k: 3}"}, "layers", ("every",)),
    ({"rest": "layers: monotone", "student": "deep"}, "layers", ("up to 4 student layers", "strict: false")),
    ({"rest": "layers: {strategy: learned, seed: 3}"}, "layers.seed", ("unknown key", "final_temperature")),
    ({"rest": "layers: {strategy: random, redraw: 0}"}, "layers.redraw", ("at least 1",)),
    ({"rest": "layers: learned", "inputs": "teacher", "student": "same"}, "layers", ("inputs: student",)),
    ({"rest": "layers: cka", "tap": "mixing"}, "layers", ("mixing is none",)),
    ({"rest": "layers: uniform", "tap": "mlp_output"}, "tap", ("mamba2", "no MLP")),
    ({"rest": "layers: uniform\nprojector: none"}, "projector", ("32 wide", "64", "auto or linear")),
    ({"rest": "layers: uniform\nprojector: {kind: orthogonal, init: ridge}"}, "projector", ("procrustes, pca",)),
    (
        {"rest": "layers: uniform\nprojector: {kind: linear, init: ridge}", "student": "deep", "calibration": 64},
        "projector",
        ("calibration.tokens is 64", "at least 65", "256"),
    ),
    ({"rest": "layers: uniform\nloss: {kind: cka}\nprojector: linear"}, "", ("takes no projector",)),
    (
        {"rest": "layers: uniform\nloss: {kind: attention_bridge}\nprojector: none", "tap": "mixing"},
        "projector",
        ("32 wide", "64"),
    ),
    ({"rest": "layers: uniform\nloss: {kind: mse}", "tap": "values"}, "", ("compared by relation",)),
    ({"rest": "layers: uniform\nloss: {kind: relation}"}, "", ("does not fit the tap 'hidden'",)),
    ({"rest": "layers: uniform\nloss: {kind: relation}", "tap": "mixing"}, "", ("of: queries or of: keys",)),
    ({"rest": "layers: uniform\nloss: {kind: relation, of: keys}", "tap": "values"}, "", ("have no 'of'",)),
    (
        {"rest": "layers: uniform\nloss: {kind: relation, of: keys, heads: 5}", "tap": "mixing"},
        "loss.heads",
        ("1 | 2 | 4", "student 32, teacher 32"),
    ),
    ({"rest": "layers: uniform\nloss: {kind: mixing, heads: [[1, 0]]}", "tap": "mixing"}, "loss.heads", ("4 rows",)),
    ({"rest": "layers: uniform\nloss: {kind: mse, weight: auto}"}, "loss.weight", ("Give one of them a number",)),
    ({"rest": "layers: uniform\nloss: {kind: mse, weight: atuo}"}, "loss.weight", ("Did you mean 'auto'",)),
    (
        {"rest": "layers: uniform\nschedule: {start: 0.5, end: 0.2}"},
        "schedule",
        ("start must be below end", "0.5", "0.2"),
    ),
]


@pytest.mark.parametrize(("values", "place", "words"), PROBLEMS, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_is_told_where_it_is(
    plan_of: PlanOf, content: Callable[..., str], values: dict[str, str], place: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(MappingFileError) as caught:
        plan_of(content(**values))
    (problem,) = caught.value.problems
    where = "stages[0].align[0]" + (f".{place}" if place else "")
    assert f" {where}: " in problem
    for word in words:
        assert word in problem


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.33), (0.2, 0.7), (0.31, 1.0), (0.999, 1.0)])
@pytest.mark.parametrize("steps", [1, 7, 10])
def test_the_first_step_at_which_nothing_counts_is_found(kind: str, start: float, end: float, steps: int) -> None:
    """As by looking at every step, without looking at every step."""
    for initial, final in ((1.0, 0.0), (0.0, 1.0)):
        schedule = WeightSchedule(kind=kind, start=start, end=end, initial=initial, final=final)
        later = WeightSchedule(start=0.5)
        for schedules in ((schedule,), (schedule, later)):
            dead = [s for s in range(steps) if not any(one.factor(s / steps) > 0 for one in schedules)]
            found = [s for s in _turns(schedules, steps) if not any(one.factor(s / steps) > 0 for one in schedules)]
            assert found[:1] == dead[:1]


def test_a_stage_in_which_nothing_counts_at_some_step(plan_of: PlanOf, content: Callable[..., str]) -> None:
    with pytest.raises(MappingFileError) as caught:
        plan_of(content("layers: uniform\nschedule: {kind: linear, end: 0.5}"))
    (problem,) = caught.value.problems
    assert "stages[0]: no objective has a weight above 0 at step 6 of 10" in problem
    plan_of(content("layers: uniform\nschedule: {kind: linear, end: 0.5, final: 0.1}"))


WARNINGS = [
    ("layers: uniform\nprojector: {kind: linear, init: ridge}", 100, "calibration.tokens of 128 or more"),
    ("layers: uniform\nloss: {kind: cka}", 256, "compares 32 tokens at a time in 64 dimensions by cka"),
    ("layers: monotone", 256, "which layers monotone pairs follows from a calibration pass"),
]


@pytest.mark.parametrize(("rest", "calibration", "words"), WARNINGS)
def test_what_is_doubtful_is_a_warning(
    plan_of: PlanOf, content: Callable[..., str], rest: str, calibration: int, words: str
) -> None:
    assert any(words in warning for warning in plan_of(content(rest, calibration=calibration)).warnings)


def test_a_map_that_is_drawn_anew_outgrows_a_cache(plan_of: PlanOf, content: Callable[..., str]) -> None:
    text = content("layers: {strategy: random, redraw: 5}")
    words = "the map of e is redrawn every 5 steps, so the cache may exceed"
    assert not any(words in warning for warning in plan_of(text).warnings)
    cached = text.replace("    train: [all]", "    train: [all]\n    batches: 2\n    cache: memory")
    assert any(words in warning for warning in plan_of(cached).warnings)


def test_weights_and_schedules_are_in_the_printed_plan(plan_of: PlanOf, content: Callable[..., str]) -> None:
    from rich.console import Console

    plan = plan_of(
        content("layers: learned\nloss: {kind: mse, weight: auto}\nschedule: {kind: cosine}") + "    tokens: {}\n"
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_plan(plan))
    assert "auto × 0.25, cosine" in capture.get()
    assert "learned: student layers down, teacher layers across" in capture.get()


@pytest.mark.parametrize(("width", "told"), [(64, False), (96, True)])
def test_layers_compared_on_fewer_tokens_than_dimensions(
    plan_of: PlanOf, folder_of: FolderOf, width: int, told: bool
) -> None:
    folder = folder_of("llama", num_hidden_layers=4, hidden_size=width)
    text = FILE.format(
        teacher=folder, student=folder, rest="layers: cka", tap="hidden", inputs="student", calibration=64
    )
    words = "in up to 96 dimensions on 64 tokens, so that noise may decide; calibration.tokens of 384 or more"
    assert any(words in warning for warning in plan_of(text).warnings) == told


FRESH = (
    "{config: {model_type: llama, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, "
    "num_attention_heads: 4}}"
)


@pytest.mark.parametrize(("tap", "loss"), [("hidden", "mse"), ("mixing", "attention_bridge")])
def test_a_fresh_student_of_equal_width_has_dimensions_of_its_own(
    plan_of: PlanOf, content: Callable[..., str], tap: str, loss: str
) -> None:
    text = content(f"layers: uniform\nloss: {{kind: {loss}}}", student="same", tap=tap)
    existing = plan_of(text).stages[0].pairs
    fresh = plan_of("\n".join(f"student: {FRESH}" if "student:" in line else line for line in text.split("\n")))
    assert {pair.projector for pair in existing} == {"none"}
    assert {pair.projector for pair in fresh.stages[0].pairs} == {"linear"}
    assert fresh.stages[0].projector_parameters > 0
