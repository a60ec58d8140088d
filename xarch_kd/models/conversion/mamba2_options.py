"""Sizes of converted Mamba-2 mixers that other programs require, with what they cost at the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from transformers import PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.teacher_spec import TeacherSpec

NAMES: Final = ("expand", "proj_bias", "n_groups")


def set_mamba2_options(config: PreTrainedConfig, options: Mapping[str, Any], spec: TeacherSpec) -> None:
    """Set the sizes of a student's Mamba-2 mixers in its config.

    Raises ConversionError for an unknown option, and for sizes that the teacher's heads do not fit.
    """
    unknown = [name for name in options if name not in NAMES]
    if unknown:
        raise ConversionError("Unknown options of Mamba-2 mixers.", asked=", ".join(unknown), allowed=", ".join(NAMES))
    given, sizes = {name: value for name, value in options.items() if value is not None}, {}
    if "expand" in given:
        channels, rest = divmod(given["expand"] * spec.width, spec.heads)
        if rest or channels < spec.head_dim:
            raise ConversionError(
                "Mixers of this width do not hold the teacher's heads.",
                asked=f"expand: {given['expand']}",
                found=f"hidden size {spec.width}, {spec.heads} heads of {spec.head_dim}",
                allowed=f"expand × {spec.width} a multiple of {spec.heads}, and at least {spec.heads * spec.head_dim}",
            )
        sizes |= {"mamba_expand": given["expand"], "mamba_d_head": channels}
    if "n_groups" in given:
        if spec.heads % given["n_groups"]:
            raise ConversionError(
                "The heads do not divide evenly over the groups.",
                asked=f"n_groups: {given['n_groups']}",
                allowed=f"a divisor of {spec.heads}, the number of heads",
            )
        sizes["mamba_n_groups"] = given["n_groups"]
    if given.get("proj_bias") is False:
        sizes["mamba_proj_bias"] = False
    config.update(sizes)


def mamba2_option_notices(options: Mapping[str, Any], spec: TeacherSpec) -> Iterator[str]:
    """Yield what the options cost where the mixers do not start as they do without them."""
    if options.get("proj_bias") is False:
        yield (
            "proj_bias: false: the bias that opens the mixers' gates is a row along the mean input of each block "
            "instead. On SmolLM2-135M-Instruct the mixers' first outputs differ by 1 to 5 % (root mean square) and are "
            "as near to the attention as with biases."
        )
        if spec.output_bias:
            yield "proj_bias: false: the bias of the teacher's output projection is dropped in replaced blocks."
    groups = options.get("n_groups") or spec.heads
    if groups < spec.heads:
        yield (
            f"n_groups: {groups}: {spec.heads // groups} heads share the mean of their queries and keys and one norm, "
            "so that the mixers start further from the attention that they replace: on SmolLM2-135M-Instruct their "
            "first outputs differ by 10 to 32 % with 3 groups of 9 heads and by 29 to 81 % with 1, and are up to 4 % "
            "and 15 % further from the attention's."
        )
