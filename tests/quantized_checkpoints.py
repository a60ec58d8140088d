"""Tiny checkpoints in the published formats of GPTQ, AWQ and compressed-tensors, packed here, with their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

_GROUP: Final = 32
# AWQ stores column ORDER[i] of each eight in the i-th four bits.
_AWQ_ORDER: Final = [0, 2, 4, 6, 1, 3, 5, 7]
# Format -> bits, symmetric; its options follow in `_config`.
FORMATS: Final[dict[str, tuple[int, bool]]] = {
    "pack-quantized": (4, True),
    "pack-quantized-asymmetric": (4, False),
    "int-quantized": (8, True),
    "float-quantized": (8, True),
    "gptq": (4, True),
    "gptq-desc-act": (4, False),
    "gptq-8": (8, True),
    "awq": (4, False),
}


def quantized_folder(folder: Path, name: str) -> dict[str, Tensor]:
    """Write a Llama's checkpoint in a format of `FORMATS`; return the values of its projections in float64."""
    bits, symmetric = FORMATS[name]
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        weight, prefix = tensors.pop(key), key.removesuffix("weight")
        if name == "float-quantized":
            scale = weight.abs().amax(1, keepdim=True) / 448
            stored = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
            # The scale of activations that is fixed in advance, as vLLM reads it.
            stored["input_scale"] = torch.ones(1)
            values[key] = stored["weight"].double() * scale.double()
        else:
            values[key], stored = _integers(weight, name, bits, symmetric=symmetric)
        tensors |= {prefix + part: tensor.contiguous() for part, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": _config(name, bits, symmetric)}))
    return values


def _integers(weight: Tensor, name: str, bits: int, *, symmetric: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weight's values in float64, and the tensors of a format that stand for them."""
    order = torch.arange(weight.shape[1])
    if name == "gptq-desc-act":
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    groups = weight[:, order].unflatten(1, (-1, _GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    largest = 2**bits - 1
    if symmetric:
        scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        zero = torch.full_like(scale, 2 ** (bits - 1)).long()
    else:
        scale = ((high - low) / largest).half()
        zero = (-low / scale).round().clamp(1, largest).long()
    codes = ((groups / scale[..., None]).round().long() + zero[..., None]).clamp(0, largest)
    values = (codes - zero[..., None]).double() * scale.double()[..., None]
    back = order.argsort()
    codes, values = codes.flatten(1)[:, back], values.flatten(1)[:, back]
    if name.startswith("gptq"):
        return values, {
            "qweight": _packed(codes, bits).T,
            # The first version of the format stores one less than the zero point.
            "qzeros": _packed(zero.T - 1, bits),
            "scales": scale.T,
            "g_idx": (back // _GROUP).int(),
        }
    if name == "awq":
        return values, {
            "qweight": _packed(codes.T, bits, _AWQ_ORDER),
            "qzeros": _packed(zero.T, bits, _AWQ_ORDER),
            "scales": scale.T,
        }
    if name == "int-quantized":
        return values, {"weight": (codes - 2 ** (bits - 1)).to(torch.int8), "weight_scale": scale}
    stored = {"weight_packed": _packed(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return values, stored if symmetric else stored | {"weight_zero_point": _packed(zero.T, bits).T}


def _packed(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Return codes [rows, columns] as int32 [rows, columns × bits / 32], the first in the lowest bits."""
    each = codes.reshape(codes.shape[0], -1, 32 // bits)
    each = each if order is None else each[..., order]
    whole = (each << (torch.arange(32 // bits) * bits)).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def _config(name: str, bits: int, symmetric: bool) -> dict[str, Any]:
    if name.startswith("gptq"):
        order = {"sym": symmetric, "desc_act": name == "gptq-desc-act"}
        return {"quant_method": "gptq", "bits": bits, "group_size": _GROUP, "checkpoint_format": "gptq", **order}
    if name == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": _GROUP, "zero_point": True, "version": "gemm"}
    kind = "float" if name == "float-quantized" else "int"
    weights: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if kind == "float" else {"strategy": "group", "group_size": _GROUP}
    activations: dict[str, Any] | None = None
    if not name.startswith("pack"):
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": kind == "int"}
    return {
        "quant_method": "compressed-tensors",
        "format": name.removesuffix("-asymmetric"),
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }
