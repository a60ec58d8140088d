"""A student that existed before keeps its tokenizer; notices of the plan are printed by a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig

from xarch_kd.job.train import train
from xarch_kd.models.loading.load import load_model
from xarch_kd.testing.mapping import LOGIT_STAGE, Write
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"


@pytest.mark.filterwarnings("ignore:Only the first 97 of 97 teacher and 98 student vocabulary rows")
def test_an_existing_student_is_saved_with_its_own_tokenizer(write_mapping: Write, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    model = tiny_model("bamba", vocab_size=98, rms_norm_eps=1e-5)
    model.generation_config = GenerationConfig(eos_token_id=97, max_new_tokens=7)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|user|>", TEMPLATE
    tokenizer.save_pretrained(folder)
    student = {"model": str(folder), "format": "mamba_ssm"}
    stage = {**LOGIT_STAGE, "steps": 1, "train": ["all"]}
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    run = train(write_mapping(stage, student=student), tmp_path / "run", console=console)
    for saved in (run.student, tmp_path / "run" / "mamba_ssm"):
        own = AutoTokenizer.from_pretrained(saved)
        assert own.get_vocab() == tokenizer.get_vocab() and len(own) == 98
        assert own.convert_tokens_to_ids("<|user|>") == 97 == own.eos_token_id
        assert own.chat_template == TEMPLATE
    assert load_model(str(run.student)).config.vocab_size == 98
    assert json.loads((run.student / "generation_config.json").read_text())["max_new_tokens"] == 7
    # A notice of the plan.
    assert "warning: the student's vocabulary has 98 rows and the teacher's 97" in printed.getvalue()
