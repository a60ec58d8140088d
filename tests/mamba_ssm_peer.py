"""mamba_ssm run on a CPU: its own modules, with its own reference functions in place of its kernels.

transformers takes mamba_ssm's kernels for every device wherever it can import the package, so the package is in a
folder of its own that only a process which imports this module and calls `load_mamba_ssm` sees. What it does not bring
is written out here: the convolution of causal_conv1d and the rotary positions of flash_attn.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
# Where `make test` installs it; a folder of one's own: XARCH_KD_PEERS=…
PEERS = Path(os.environ.get("XARCH_KD_PEERS", Path(sys.prefix) / "peers"))

needs_mamba_ssm = pytest.mark.skipif(
    not (PEERS / "mamba_ssm").is_dir(),
    reason=f"mamba_ssm is not in {PEERS.name}/ of the environment: make test puts it",
)


def in_a_process_of_its_own(module: str, *arguments: str | Path) -> str:
    """Run a module of the tests as a program and return what it printed."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_mamba_ssm() -> Any:
    """Return the class MambaLMHeadModel, whose models run on a CPU from now on, gradients included."""
    sys.path.append(str(PEERS))
    # A CUDA extension that the package imports before it asks whether it is needed.
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    scan = _module("ops.selective_scan_interface")
    mamba = _module("modules.mamba_simple")
    mamba2 = _module("modules.mamba2")
    combined = _module("ops.triton.ssd_combined")
    gated = _module("ops.triton.layernorm_gated")
    norms = _module("ops.triton.layer_norm")
    blocks = _module("modules.block")
    attention = _module("modules.mha")
    whole = _module("models.mixer_seq_simple")
    scan.selective_scan_fn = scan.selective_scan_ref
    mamba.selective_scan_fn = scan.selective_scan_ref
    combined.causal_conv1d_fn = convolution

    def split_scan(*arguments: Any, ngroups: int, seq_idx: None, rmsnorm_weight: Tensor, **named: Any) -> Tensor:
        # The reference forgets that the norm goes group by group, which its kernel does.
        combined.rmsnorm_fn = functools.partial(gated.rms_norm_ref, group_size=rmsnorm_weight.numel() // ngroups)
        return combined.mamba_split_conv1d_scan_ref(*arguments, ngroups=ngroups, rmsnorm_weight=rmsnorm_weight, **named)

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_rms_norm: bool, **named: Any) -> Any:
        assert is_rms_norm
        # The residual stream is in float32 here anyway.
        named.pop("residual_in_fp32")
        return norms.rms_norm_ref(x, weight, bias, **named)

    mamba2.mamba_split_conv1d_scan_combined = split_scan
    blocks.layer_norm_fn = norm
    whole.layer_norm_fn = norm
    attention.RotaryEmbedding = Rotary
    return whole.MambaLMHeadModel


def _module(name: str) -> Any:
    return importlib.import_module(f"mamba_ssm.{name}")


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return the causal depthwise convolution of x [batch, channels, time], weight [channels, width], and its silu."""
    assert activation == "silu"
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    return functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]))


class Rotary(nn.Module):
    """Rotary positions in halves, as flash_attn's: of q [batch, time, heads, width], and of kv in place."""

    def __init__(self, dim: int, base: float, interleaved: bool, device: Any = None) -> None:
        super().__init__()
        assert not interleaved
        self.dim, self.base = dim, base

    def forward(self, q: Tensor, kv: Tensor, *, seqlen_offset: int, max_seqlen: int | None) -> tuple[Tensor, Tensor]:
        assert seqlen_offset == 0 and max_seqlen is None
        rotated = torch.stack([self.rotate(kv[:, :, 0]), kv[:, :, 1]], dim=2)
        if torch.is_grad_enabled():
            return self.rotate(q), rotated
        return self.rotate(q), kv.copy_(rotated)

    def rotate(self, x: Tensor) -> Tensor:
        half = self.dim // 2
        speed = self.base ** (-torch.arange(half) / half)
        angle = (torch.arange(x.shape[1])[:, None] * speed)[:, None]
        low, high, rest = x[..., :half], x[..., half : self.dim], x[..., self.dim :]
        turned = (low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin())
        return torch.cat([*turned, rest], dim=-1)
