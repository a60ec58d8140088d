"""Every shipped mapping trains: its stages, taps, strategies and losses on a tiny teacher of the same family."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from xarch_kd._layout import folder
from xarch_kd.job.train import train
from xarch_kd.mapping_file.load import load_mapping
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.runs import events_of
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

FILES = sorted(folder("mappings").glob("*.yaml"))

# The family of each teacher, by how its file's name begins.
FAMILIES = {"smollm2-135m": "llama", "llama": "llama", "qwen3": "qwen3", "gpt2": "gpt2"}
DEPTH = 4
STEPS = 4
# Loss and parts of every step, recorded on the machine that the file names.
GOLDEN = Path(__file__).with_name("golden_curves.json")

# Sizes of a fresh student, by model type; everything else in its config stays as it is written.
SMALL: dict[str, dict[str, Any]] = {
    # Rows are padded to whole chunks, of 256 tokens by default.
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "chunk_size": 16,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny teachers with their tokenizer, by family."""
    folders = {}
    for family in sorted(set(FAMILIES.values())):
        path = tmp_path_factory.mktemp(family)
        depth: dict[str, Any] = {"n_layer" if family == "gpt2" else "num_hidden_layers": DEPTH}
        # The epsilon of SmolLM2's norms, the only one that the format of mamba_ssm holds.
        epsilon: dict[str, Any] = {"rms_norm_eps": 1e-5} if family == "llama" else {}
        tiny_model(family, **depth, **epsilon).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        folders[family] = str(path)
    return folders


def shrunk(path: Path, teacher: str, text: Path) -> dict[str, Any]:
    """Return a file's content with other sizes: teacher, student, blocks by number, text, steps."""
    content: dict[str, Any] = load_mapping(path)[0].model_dump(mode="json", exclude_unset=True)
    content["teacher"] = {**content["teacher"], "model": teacher, "dtype": "float32"}
    student = content["student"]
    if "convert" in student and "replace" in student["convert"]:
        student["convert"]["replace"] = [1, 2]
    if "config" in student:
        config = student["config"]
        config |= SMALL[config["model_type"]]
        # Equal depths stay equal: the file pairs each block with its twin.
        if any(entry.get("layers") == "same" for stage in content["stages"] for entry in stage.get("align", [])):
            config["num_hidden_layers"] = DEPTH
    order = content["data"].get("order", "per_stage")
    content["data"] = {"files": [str(text)], "sequence_length": 16, "batch_size": 2, "order": order}
    content |= {"device": "cpu", "calibration": {"tokens": 256}}
    for stage in content["stages"]:
        stage |= {"steps": STEPS, "batches": 2} if "batches" in stage else {"steps": STEPS}
        if "batch_size" in stage:
            stage["batch_size"] = 1
    # Evaluation reads no part of a file that its plan does not, and reads both models again.
    content.pop("evaluate", None)
    return content


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_trains_in_all_of_its_stages(
    path: Path, tmp_path: Path, teachers: dict[str, str], text_file: Path
) -> None:
    teacher = teachers[FAMILIES[path.stem.split("--")[0]]]
    mapping = tmp_path / path.name
    mapping.write_text(yaml.safe_dump(shrunk(path, teacher, text_file), sort_keys=False), encoding="utf-8")
    plan = make_plan(mapping, rates=Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11}))
    # The structure is the file's: its stages, objectives, taps, layers and losses.
    original = load_mapping(path)[0]
    for stage, written in zip(plan.stages, original.stages, strict=True):
        assert stage.stage.align == written.align and stage.stage.tokens == written.tokens
        assert (stage.stage.train, stage.stage.inputs) == (written.train, written.inputs)
        assert {pair.align for pair in stage.pairs} == {entry.name for entry in written.align}
    run = train(plan, tmp_path / "run")
    steps = [event for event in events_of(tmp_path / "run") if event["event"] == "step"]
    assert [event["stage"] for event in steps] == [stage.name for stage in original.stages for _ in range(STEPS)]
    assert (run.student / "model.safetensors").is_file()
    check_golden(path.stem, [{"loss": event["loss"], **event["parts"]} for event in steps])


def check_golden(name: str, found: list[dict[str, float]]) -> None:
    """Compare losses with the recorded ones: bitwise where they were recorded, to rounding on other processors.

    With XARCH_KD_RECORD_GOLDEN=1 the recorded ones are replaced.
    """
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {"machine": machine(), "curves": {}}
    if os.environ.get("XARCH_KD_RECORD_GOLDEN") == "1":
        golden["curves"][name] = found
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    expected = golden["curves"][name]
    if golden["machine"] == machine():
        assert found == expected
        return
    assert [step.keys() for step in found] == [step.keys() for step in expected]
    for step, recorded in zip(found, expected, strict=True):
        # Float32 sums of other processors differ in their last digits, which few steps of AdamW can amplify.
        assert step == pytest.approx(recorded, rel=1e-3, abs=1e-6)


def machine() -> str:
    """Return what the last bits of a loss depend on."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {processor()}"


def processor() -> str:
    """Return the processor's model, which decides what code a matrix library runs."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()
