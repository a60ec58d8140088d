"""Models of the package mamba_ssm (https://github.com/state-spaces/mamba), told by their class; it is not imported.

Their blocks are given what the block before added and the residual stream before that, and return the same pair of
their own, so that a kernel can add and norm in one go. They know neither attention masks nor caches of transformers.
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
    """Return whether a module is of the class `name` of mamba_ssm, or of a child of it."""
    return any(
        parent.__name__ == name and parent.__module__.partition(".")[0] == PACKAGE for parent in type(module).__mro__
    )


def is_mamba_ssm_model(model: nn.Module) -> bool:
    """Return whether `model` is a `mamba_ssm.MambaLMHeadModel`."""
    return is_of_mamba_ssm(model, "MambaLMHeadModel")


def mamba_ssm_family(model: Any) -> Family:
    """Return where the parts of a `MambaLMHeadModel` are; without an MLP its blocks are mixers alone."""
    return FAMILY if model.config.d_intermediate else replace(FAMILY, mlp=None)


def check_mask(attention_mask: Tensor | None) -> None:
    """Raise `TapError` for a mask that such a model, which is given none, would have to heed: padding on the left."""
    if attention_mask is not None:
        checks.require(
            attention_mask[:, 0].bool().all(),
            lambda: TapError(
                "mamba_ssm's models take no attention mask, so padding on the left would be read as text.",
                found="padding before the first token of a sequence",
                fix="pad on the right, or pack the rows",
            ),
        )
