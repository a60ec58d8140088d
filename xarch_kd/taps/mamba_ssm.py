"""Models of the package mamba_ssm (https://github.com/state-spaces/mamba), identified by class without importing it.

Their blocks take the output of the previous block and the residual stream before it, and return such a pair, so that a
kernel can fuse addition and norm. They support neither attention masks nor the caches of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn

from xarch_kd.errors import TapError
from xarch_kd.ops import checks
from xarch_kd.taps.families import Family

PACKAGE: Final = "mamba_ssm"
FAMILY: Final = Family(
    blocks="backbone.layers",
    mixers=(("mixer", None),),
    mlp="mlp",
    embedding="backbone.embedding",
    final_norm="backbone.norm_f",
    head="lm_head",
    block_returns="pair",
)


def is_of_mamba_ssm(module: nn.Module, name: str) -> bool:
    """Return True if a module is an instance of the class `name` of mamba_ssm."""
    return any(
        parent.__name__ == name and parent.__module__.partition(".")[0] == PACKAGE for parent in type(module).__mro__
    )


def is_mamba_ssm_model(model: nn.Module) -> bool:
    """Return True if `model` is a `mamba_ssm.MambaLMHeadModel`."""
    return is_of_mamba_ssm(model, "MambaLMHeadModel")


def mamba_ssm_family(model: Any) -> Family:
    """Return the module paths of a `MambaLMHeadModel`; without an MLP its blocks have a mixer only."""
    return FAMILY if model.config.d_intermediate else replace(FAMILY, mlp=None)


def check_mask(attention_mask: Tensor | None) -> None:
    """Raise `TapError` for a mask with left padding, which such a model cannot take into account."""
    if attention_mask is not None:
        checks.require(
            attention_mask[:, 0].bool().all(),
            lambda: TapError(
                "mamba_ssm's models take no attention mask, so padding on the left would be read as text.",
                found="padding before the first token of a sequence",
                fix="pad on the right, or pack the rows",
            ),
        )
