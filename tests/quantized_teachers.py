"""Quantized teachers, run in a process of its own: `python -m tests.quantized_teachers FOLDER`.

Importing transformers takes longer and prints more where torchao can be imported, so it and compressed-tensors may be
in the folder of the peers. Prints one line of JSON with what was measured.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mamba_ssm_peer import PEERS

sys.path.append(str(PEERS))

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

import xarch_kd as xkd
from tests.quantized_checkpoints import FORMATS, quantized_folder
from xarch_kd.errors import XarchError
from xarch_kd.models.loading.load import load_model
from xarch_kd.models.loading.quantized import PACKAGES, Quantization, full_precision
from xarch_kd.testing.mapping import TEXT
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

CONSOLE = Console(quiet=True)
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
    found["lacking"] = {name: package for name in FORMATS if (package := lacking_package(name)) is not None}
    found["checkpoints"] = {name: checkpoint(folder, name) for name in FORMATS if name not in found["lacking"]}
    print(json.dumps(found))


def lacking_package(name: str) -> str | None:
    """Return the first package that a format of `FORMATS` lacks here."""
    method = name.split("-")[0] if name.startswith(("gptq", "awq")) else "compressed-tensors"
    return next((package for package in PACKAGES[method] if importlib.util.find_spec(package) is None), None)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))).logits


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """Return the error of a stored teacher's logits, what a run with it measured, and how a conversion is refused."""
    teacher = folder / name
    values = quantized_folder(teacher, name)
    quantized, plain = load_model(str(teacher), allow_quantized=True), tiny_model("llama")
    state, own = plain.state_dict(), quantized.state_dict()
    for key, value in values.items():
        # The product of a code and a float16 scale is rounded to float16 by both packages.
        state[key].copy_(value if name == "float-quantized" else value.half())
    expected = logits_of(plain)
    student = {"config": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}}
    refused = {"convert": {"mixer": "mamba2", "replace": [1]}}
    found: dict[str, Any] = {
        "logits": float((logits_of(quantized) - expected).abs().max() / expected.abs().max()),
        "equal": all(torch.equal(own[key], state[key]) for key in values) if set(values) <= set(own) else None,
        "refused": [message(lambda: xkd.plan(mapping(folder, str(teacher), None, refused)))],
    }
    if found["equal"] is None:
        found["refused"].append(message(lambda: xkd.convert(quantized, replace=[1])))
    if name in ("pack-quantized", "gptq", "awq"):
        run = folder / f"run-{name}"
        xkd.train(mapping(folder, str(teacher), None, student), run, console=CONSOLE)
        found["teacher_nll"] = teacher_nll(run)
    return found


def message(call: Callable[[], object]) -> str:
    """Return what an error of xarch_kd prints, or an empty string."""
    try:
        call()
    except XarchError as error:
        return str(error)
    return ""


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
    }
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def trained(folder: Path, teacher: str, kind: str | None) -> dict[str, float]:
    """Return the teacher's NLL in a run's evaluation and the change of the student."""
    sizes = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    student = {"config": {**sizes, "intermediate_size": 96}}
    run = xkd.train(mapping(folder, teacher, kind, student), folder / f"run-{kind}", console=CONSOLE)
    trained = float(load_model(str(run.student)).lm_head.weight.double().sum())
    return {"teacher_nll": teacher_nll(folder / f"run-{kind}"), "student": trained}


def teacher_nll(run: Path) -> float:
    """Return the teacher's NLL on the held-out text of a run."""
    return float(xkd.evaluate(run, suites=["likelihood"], tokens=512, console=CONSOLE).result("held-out").teacher_nll)


def refusals(folder: Path, teacher: str) -> list[str]:
    """Return the messages of what is refused."""
    convert = {"convert": {"mixer": "mamba2", "replace": [1]}}
    quantized = load_model(teacher, quantization="int8")
    return [
        message(lambda: xkd.plan(mapping(folder, teacher, "int8", convert))),
        message(lambda: xkd.convert(quantized, replace=[1])),
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
