"""int8 and int4 teachers by torchao, run in a process of its own: `python -m tests.quantized_teachers FOLDER`.

Importing transformers takes longer and prints more where torchao can be imported, so the package may be in the folder
of the peers. Prints one line of JSON with what was measured.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from tests.mamba_ssm_peer import PEERS

if importlib.util.find_spec("torchao") is None:
    sys.path.append(str(PEERS))

import torch
import yaml
from rich.console import Console
from torch import nn

import xarch_kd as xkd
from xarch_kd.errors import XarchError
from xarch_kd.models.loading.load import load_model
from xarch_kd.models.loading.quantized import Quantization, full_precision
from xarch_kd.testing.mapping import TEXT
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

# Values of one scale, and steps from zero to the largest of them.
SCALES: dict[Quantization, tuple[int, int]] = {"int8": (64, 127), "int4": (32, 7)}


def main(folder: Path) -> None:
    """Print what is measured."""
    teacher = folder / "teacher"
    tiny_model("llama").save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    (folder / "text.txt").write_text("".join(f"{number}. {TEXT}" for number in range(60)))
    found: dict[str, Any] = {kind: measured(str(teacher), kind) for kind in SCALES}
    found["refused"] = refusals(folder, str(teacher))
    found["runs"] = {str(kind): trained(folder, str(teacher), kind) for kind in (None, "int8")}
    print(json.dumps(found))


@torch.no_grad()
def measured(teacher: str, kind: Quantization) -> dict[str, Any]:
    """Return errors of weights and logits, and the share of memory."""
    plain, quantized = load_model(teacher), load_model(teacher, quantization=kind)
    size, steps = SCALES[kind]
    worst, linear = 0.0, []
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            own: Any = plain.get_submodule(name)
            original = own.weight
            # Half a step of the scale that the largest value of a row or group gives.
            groups = original.unflatten(1, (-1, min(size, original.shape[1]) if kind == "int4" else original.shape[1]))
            half = groups.abs().amax(-1, keepdim=True) / steps / 2
            values = full_precision(module.weight)
            worst = max(worst, float(((values - original).view_as(groups).abs() / half).max()))
            linear.append(type(module.weight).__name__)
            original.copy_(values)
    ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, logits = plain(ids).logits, quantized(ids).logits
    trace = xkd.trace(quantized, ids, taps=["hidden", "mixing"], layers=[1])
    own = xkd.trace(plain, ids, taps=["hidden", "mixing"], layers=[1])
    weight: Any = quantized.get_submodule("model.layers.0.mlp.up_proj").weight
    return {
        "half_steps": worst,
        "classes": sorted(set(linear)),
        "linear": len(linear),
        # Against a plain model that holds the dequantized weights.
        "logits": float((logits - expected).abs().max() / expected.abs().max()),
        "hidden": float((trace["hidden"][1] - own["hidden"][1]).abs().max()),
        "mixing": float((trace["mixing"][1].dense() - own["mixing"][1].dense()).abs().max()),
        "bytes": weight.qdata.nbytes + weight.scale.nbytes,
        "plain_bytes": full_precision(weight).nbytes,
        "head": type(quantized.lm_head.weight).__name__,
    }


def mapping(folder: Path, teacher: str, kind: str | None, student: dict[str, Any]) -> Path:
    """Write a mapping file with a quantized teacher and return it."""
    entry = {"name": "hidden", "tap": "hidden", "layers": "same", "loss": {"kind": "relative_mse"}}
    stage = {
        "name": "both", "steps": 3, "train": ["all"], "align": [entry], "tokens": {"divergence": "forward_kl"},
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    content = {
        "version": 1,
        "teacher": {"model": teacher, **({"quantization": kind} if kind else {})},
        "student": student,
        "data": {"files": [str(folder / "text.txt")], "sequence_length": 16, "batch_size": 2},
        "device": "cpu",
        "stages": [stage],
        "evaluate": {"tokens": 512},
    }
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def trained(folder: Path, teacher: str, kind: str | None) -> dict[str, float]:
    """Return the teacher's NLL in a run's evaluation and the change of the student."""
    sizes = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    student = {"config": {**sizes, "intermediate_size": 96}}
    console = Console(quiet=True)
    run = xkd.train(mapping(folder, teacher, kind, student), folder / f"run-{kind}", console=console)
    evaluation = xkd.evaluate(folder / f"run-{kind}", tokens=512, console=console)
    trained = float(load_model(str(run.student)).lm_head.weight.double().sum())
    return {"teacher_nll": evaluation.result("held-out").teacher_nll, "student": trained}


def refusals(folder: Path, teacher: str) -> list[str]:
    """Return the messages of what is refused."""
    found = []
    convert = {"convert": {"mixer": "mamba2", "replace": [1]}}
    quantized = load_model(teacher, quantization="int8")
    for call in (
        lambda: xkd.plan(mapping(folder, teacher, "int8", convert)),
        lambda: xkd.convert(quantized, replace=[1]),
    ):
        try:
            call()
        except XarchError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
