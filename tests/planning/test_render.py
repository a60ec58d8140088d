from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from xarch_kd.display import byte_text, count_text, duration
from xarch_kd.errors import ModelError, UsageError
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.render import plan_as_dict, render_plan
from xarch_kd.planning.template import mapping_text, write_mapping

PlanOf = Callable[[str], Plan]
FolderOf = Callable[..., str]


def shown(plan: Plan) -> list[str]:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(render_plan(plan))
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_a_plan_shows_blocks_pairs_stages_and_notices(good: str, plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(good.replace("./teacher", folder_of("llama", num_hidden_layers=4)))
    lines = shown(plan)
    assert "0 attention mamba2 replaced" in lines
    assert "1 attention attention" in lines
    mixers = plan.stages[0]
    assert (
        f"01-mixers teacher mixers {count_text(mixers.trainable_parameters)} 4 2 512 mixer-output (relative_mse) "
        f"{byte_text(mixers.cache_bytes)} memory {byte_text(mixers.peak_bytes)} {duration(mixers.seconds)}"
    ) in lines
    assert any(line.startswith("02-logits student") and "forward_kl at T=1, weight 1" in line for line in lines)
    assert "mixers mixer-output.2 mixer_output 2: (2, 64, 64) 2: (2, 64, 64) none relative_mse 1" in lines
    assert any(line.startswith("notice: stage mixers: every batch is drawn once") for line in lines)
    assert any(line.startswith(f"Time: {plan.timing_assumptions}") for line in lines)


def test_unequal_depths_are_shown_one_model_after_the_other(plan_of: PlanOf, folder_of: FolderOf) -> None:
    teacher, student = folder_of("llama", num_hidden_layers=4), folder_of("llama", hidden_size=32, num_hidden_layers=2)
    plan = plan_of(
        f"version: 1\nteacher: {{model: {teacher}}}\nstudent: {{config: {student}}}\ndata: {{builtin: licences}}\n"
        "stages: [{name: one, steps: 1, train: [all], align: [{name: a, tap: hidden, layers: uniform}]}]\n"
    )
    lines = shown(plan)
    assert "0-3 attention" in lines and "0-1 attention" in lines
    assert any("linear, 2.05 k parameters" in line for line in lines)


def test_a_plan_as_data_is_plain_json_and_complete(good: str, plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(good.replace("./teacher", folder_of("llama", num_hidden_layers=4)))
    plan = replace(plan, student_config={**plan.student_config, "limits": (0.0, math.inf)})
    data = json.loads(json.dumps(plan_as_dict(plan), allow_nan=False))
    assert data["student_config"]["limits"] == [0.0, {"__float__": "Infinity"}]
    assert data["stages"][0]["folder"] == "01-mixers"
    assert data["stages"][0]["pairs"][0]["name"] == "mixer-output.0"
    assert data["stages"][0]["trainable"] == list(plan.stages[0].trainable)
    assert data["teacher"]["layers"][0] == {"index": 0, "mixer": "attention", "replaced": False}
    assert data["mapping"]["stages"][1]["tokens"]["divergence"] == "forward_kl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (byte_text(512), "512 B"),
        (byte_text(540 * 2**20), "540 MiB"),
        (byte_text(5 * 2**30), "5.0 GiB"),
        (duration(0.2), "1 s"),
        (duration(99), "99 s"),
        (duration(300), "5 min"),
        (duration(9000), "2.5 h"),
        (count_text(97), "97"),
        (count_text(6_704_784), "6.70 M"),
    ],
)
def test_figures_in_words(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize("keep", [None, "every 2", "first 1", "last 2", "0, 2", "[1]"])
def test_what_init_writes_is_accepted_by_plan(keep: str | None, plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(mapping_text(folder_of("llama", num_hidden_layers=4), keep_attention=keep))
    assert plan.mapping.student.convert is not None
    assert len(plan.stages) == 2 and plan.stages[0].pairs
    assert [w for w in plan.warnings if "generation" not in w and "chosen by measurement" not in w] == []
    assert plan.is_unselected == (keep is None)


def test_init_with_no_attention_kept_is_accepted_with_its_warning(plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(mapping_text(folder_of("llama"), keep_attention="none"))
    assert any("No block keeps its attention" in warning for warning in plan.warnings)


@pytest.mark.parametrize("name", ["a # strange: 'name", "true", "null"])
def test_init_quotes_what_yaml_would_misread(
    name: str, folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path(folder_of("llama")).rename(tmp_path / name).relative_to(tmp_path)
    mapping, _ = parse_mapping(mapping_text(str(odd), keep_attention="every 2", revision="0123456"))
    assert mapping.teacher.model == str(odd) and mapping.teacher.revision == "0123456"


def test_init_refuses_what_leads_nowhere(folder_of: FolderOf) -> None:
    teacher = folder_of("llama", num_hidden_layers=3)
    with pytest.raises(UsageError, match="nothing would be left to distil"):
        mapping_text(teacher, keep_attention="all")
    with pytest.raises(UsageError, match="keep_attention names block 9"):
        mapping_text(teacher, keep_attention="0, 9")
    with pytest.raises(UsageError, match="no conversion to this mixer"):
        mapping_text(teacher, mixer="mamba3")
    with pytest.raises(ModelError, match="no such"):
        mapping_text("./no/such/folder/here")


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    write_mapping(path, "first")
    with pytest.raises(UsageError, match="exists and is left as it is"):
        write_mapping(path, "second")
    assert path.read_text() == "first"
    with pytest.raises(UsageError, match="no such folder"):
        write_mapping(tmp_path / "absent" / "map.yaml", "x")
