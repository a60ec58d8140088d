"""Features at the taps of live models of mamba_ssm, written into their folders in a process of its own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from tests.mamba_ssm_peer import load_mamba_ssm
from xarch_kd.errors import TapError
from xarch_kd.taps.layout import layout_of, trainable_names
from xarch_kd.taps.replay import block_calls, run_block
from xarch_kd.taps.trace import trace

TAPS = ("embedding", "hidden", "mixer_input", "mixer_output", "head_input", "mixing", "values")


def rebuilt(mixer: Any, entered: Tensor, mixing: Tensor, values: Tensor) -> Tensor:
    """Return a mixer's output from its matrix [batch, heads, time, time] and its values."""
    heads = mixing.shape[1] // values.shape[2]
    mixed = torch.einsum("bhij,bjhd->bihd", mixing, values.repeat_interleave(heads, dim=2))
    mixed = rearrange(mixed, "b t h d -> b t (h d)")
    if type(mixer).__name__ == "Mamba":
        mixed = mixed * functional.silu(functional.linear(entered, mixer.in_proj.weight).chunk(2, dim=-1)[1])
    if type(mixer).__name__ == "Mamba2":
        gated = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
        gate = mixer.in_proj(entered)[..., : mixer.d_ssm]
        norm, size = mixer.norm, mixer.d_ssm // mixer.ngroups
        mixed = gated.rms_norm_ref(
            mixed, norm.weight, None, z=gate, eps=norm.eps, group_size=size, norm_before_gate=False
        )
    return mixer.out_proj(mixed)


def read(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return tensors by tap, by layer where a tap has them; also blocks fed apart and mixers rebuilt."""
    layout = layout_of(model)
    taps = [*TAPS, *(["mlp_output"] if layout.mlps else [])]
    found = trace(model, ids, mask, taps=taps)
    values: dict[str, Any] = {tap: found[tap] for tap in taps}
    values["mixing"] = {layer: mixing.dense() for layer, mixing in found["mixing"].items()}
    values["kinds"] = layout.mixer_kinds
    values["trained"] = trainable_names(model, layout, ["mixers"], [1])
    calls = block_calls(model, ids, mask)
    entering = [found["embedding"], *found["hidden"].values()]
    values["replayed"] = {layer: run_block(layout, layer, entering[layer], calls) for layer in found["hidden"]}
    plain = trace(model, ids, taps=("mixer_input", "mixer_output", "mixing", "values"))
    values["rebuilt"] = {
        layer: (
            rebuilt(mixer, plain["mixer_input"][layer], plain["mixing"][layer].dense(), plain["values"][layer]),
            out,
        )
        for (layer, out), mixer in zip(plain["mixer_output"].items(), layout.mixers, strict=True)
    }
    try:
        trace(model, ids, mask.flip(1), taps=["hidden"])
    except TapError as error:
        values["left"] = str(error)
    return values


def main(root: Path) -> None:
    """Write `traces.pt` into every folder under `root`, and for the first kind of each mixer its gradients."""
    model_class = load_mamba_ssm()
    given = torch.load(root / "ids.pt", weights_only=True)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        model = model_class.from_pretrained(str(folder)).eval()
        with torch.no_grad():
            traces = read(model, given["ids"], given["mask"])
        mixings = trace(model, given["ids"], taps=["mixing"])["mixing"]
        torch.stack([mixing.dense().square().sum() for mixing in mixings.values()]).sum().backward()
        traces["gradients"] = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        torch.save(traces, folder / "traces.pt")
