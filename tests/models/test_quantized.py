"""Quantized teachers: torchao on the fly, FP8 checkpoints, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.mamba_ssm_peer import PEERS, in_a_process_of_its_own
from tests.quantized_checkpoints import FORMATS
from xarch_kd.errors import MappingFileError, ModelError
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_config, load_model
from xarch_kd.models.loading.quantized import PACKAGES, stored_method, unsupported_reason
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import GOOD, LOGIT_STAGE
from xarch_kd.testing.tiny import tiny_config, tiny_model

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})
SIZES = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures that a process of its own measured with torchao."""
    if importlib.util.find_spec("torchao") is None and not (PEERS / "torchao").is_dir():
        pytest.skip("torchao is neither installed nor in peers/ of the environment")
    printed = in_a_process_of_its_own("tests.quantized_teachers", tmp_path_factory.mktemp("quantized"))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_linear_layers_are_rounded_to_half_a_step_and_the_head_is_plain(measured: dict[str, Any], kind: str) -> None:
    found = measured[kind]
    # Seven projections in each of three blocks.
    assert found["linear"] == 21 and found["head"] == "Parameter" and "Parameter" not in found["classes"]
    # More than rounding to nothing, and at most half a step.
    assert 0.5 < found["half_steps"] <= 1 + 1e-5
    # One byte per value, and a float32 scale per row of 64 or group of 32, where there were four bytes.
    assert found["bytes"] <= found["plain_bytes"] * (1 / 4 + 1 / 32)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_logits_and_taps_are_those_of_the_rounded_weights(measured: dict[str, Any], kind: str) -> None:
    found = measured[kind]
    # Sums of at most 96 products in another order, through three blocks.
    assert found["logits"] <= 64 * torch.finfo(torch.float32).eps
    assert max(found["hidden"], found["mixing"]) <= 1e-4


def test_a_run_learns_from_and_is_measured_against_the_quantized_teacher(measured: dict[str, Any]) -> None:
    plain, quantized = measured["runs"]["None"], measured["runs"]["int8"]
    assert plain["teacher_nll"] != quantized["teacher_nll"] == pytest.approx(plain["teacher_nll"], rel=0.01)
    assert plain["student"] != quantized["student"] == pytest.approx(plain["student"], rel=0.05)


def test_conversion_of_a_quantized_teacher_is_refused(measured: dict[str, Any]) -> None:
    planned, converted = measured["refused"]
    assert "teacher.quantization: conversion takes a teacher in full precision, found quantization: int8" in planned
    assert converted.startswith("Conversion takes full-precision weights only")


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_have_the_logits_of_the_values_they_stand_for(measured: dict[str, Any], name: str) -> None:
    """GPTQ and AWQ need packages that are compiled where they are installed, so `make test` leaves them out."""
    if (package := measured["lacking"].get(name)) is not None:
        pytest.skip(f"{name} needs {package}, which is not part of the tests' environment")
    found = measured["checkpoints"][name]
    # Sums of at most 96 products in another order, through three blocks.
    assert found["logits"] <= 64 * torch.finfo(torch.float32).eps
    # GPTQ and AWQ keep their codes in classes of gptqmodel.
    assert found["equal"] is (None if name.startswith(("gptq", "awq")) else True)
    assert "conversion takes a teacher in full precision, found a checkpoint quantized" in found["refused"][0]
    assert all(message.startswith("Conversion takes full-precision weights") for message in found["refused"][1:])
    if "teacher_nll" in found:
        plain = measured["runs"]["None"]["teacher_nll"]
        assert plain != found["teacher_nll"] == pytest.approx(plain, rel=0.05)


def fp8_folder(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Write a checkpoint with FP8 projections and a scale per block of 128 × 128; return the values it stands for."""
    tiny_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name]
        rows, columns = weight.shape
        blocks = [[part.abs().max() / 448 for part in line.split(128, 1)] for line in weight.split(128)]
        scale = torch.tensor(blocks)
        whole = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        tensors[name] = (weight / whole).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        values[name] = tensors[name].float() * whole
    save_file(tensors, folder / "model.safetensors")
    set_method(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    return str(folder), values


def set_method(folder: Path, values: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": values}))


def test_fp8_weights_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    folder, values = fp8_folder(tmp_path)
    state = load_model(folder, allow_quantized=True).state_dict()
    assert len(values) == 21 and all(torch.equal(state[name], value) for name, value in values.items())
    with pytest.raises(ModelError, match=r"full-precision weights only(.|\n)*quantization_config: fp8"):
        load_model(folder)


def test_weights_without_their_scale_are_refused(tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"1 quantized weights without a scale(.|\n)*layers\.1\.mlp\.up_proj\.weight of F8"
    ):
        load_model(folder, allow_quantized=True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized; allowed: pack-quantized"),
        ({"config_groups": {"one": {"weights": {"num_bits": 8}}, "two": {"weights": {"num_bits": 4}}}}, "2 schemes"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "a sparsity_config, which is left out"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "a transform_config, which is left out"),
    ],
    ids=["format", "schemes", "sparsity", "transform"],
)
def test_compressed_tensors_that_would_be_dequantized_wrongly_are_refused(changed: dict[str, Any], reason: str) -> None:
    config = tiny_config("llama")
    config.quantization_config = METHODS["compressed-tensors"] | changed
    assert reason in str(unsupported_reason(config, None))


def test_weights_in_fp8_are_not_converted() -> None:
    teacher = tiny_model("llama")
    weight = teacher.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"full-precision weights only(.|\n)*up_proj\.weight: Parameter of .*float8"):
        convert(teacher, replace=[1])


METHODS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
    },
    "fp8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("method", PACKAGES)
def test_a_missing_package_is_named_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    set_method(tmp_path, METHODS[method])
    assert stored_method(load_config(str(tmp_path))) == method
    content = yaml.safe_load(GOOD.replace("./teacher", str(tmp_path)))
    content |= {"student": {"config": SIZES}, "stages": [{**LOGIT_STAGE, "train": ["all"]}]}
    find = importlib.util.find_spec
    packages = {package for needed in PACKAGES.values() for package in needed}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))
    package = " ".join(PACKAGES[method]).replace("_", "-")
    if not package:
        assert make_plan(content, rates=RATES).teacher.model_type == "llama"
        return
    message = rf"teacher\.model: a checkpoint quantized by {method} needs the package (.|\n)*pip install {package}"
    with pytest.raises(MappingFileError, match=message):
        make_plan(content, rates=RATES)
    with pytest.raises(MappingFileError, match="conversion takes a teacher in full precision"):
        make_plan({**content, "student": {"convert": {"mixer": "mamba2", "replace": [1]}}}, rates=RATES)
    with pytest.raises(MappingFileError, match="a student trains in full precision"):
        make_plan({**content, "student": {"model": str(tmp_path)}}, rates=RATES)


def test_other_methods_and_two_at_once_are_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "hqq"}
    assert "allowed: bitsandbytes, torchao, gptq" in str(unsupported_reason(config, None))
    config.quantization_config = {"quant_method": "fp8"}
    assert "quantized already (fp8)" in str(unsupported_reason(config, "int8"))
