"""Each script of examples/ runs on a tiny teacher, and does what it says."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.testing.mapping import TEXT
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(folder / "teacher")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("".join(f"{number}. {TEXT}\n" for number in range(24)))
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 60)
    return folder


# Script → its arguments on tiny files.
SCRIPTS = {
    "own_loop": ["teacher", "text.txt", "--steps", "6", "--length", "16"],
    "own_objective": ["teacher", "text.txt", "--steps", "2", "--length", "16"],
    "layer_maps": ["teacher", "text.txt", "--steps", "2", "--length", "16"],
    "chat": ["teacher", "chat.jsonl", "--steps", "2", "--length", "32"],
    "attention_beside_ssm": ["teacher", TEXT[:20]],
}


def test_every_script_is_run_and_short() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    assert all(len(path.read_text().splitlines()) < 80 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    result: Any = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](SCRIPTS[name])
    if name == "own_loop":
        assert result[-1] < result[0]
        assert (workshop / "student" / "model.safetensors").is_file()
    elif name == "layer_maps":
        assert len(result) == 3 and all(map(math.isfinite, result.values()))
    elif name == "attention_beside_ssm":
        assert 0 < result < 2
    else:
        assert result.is_finished
        (stage, *_) = result.stages.values()
        assert stage.step == 2
