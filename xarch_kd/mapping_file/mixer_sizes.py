"""Sizes of the mixers of a converted student in a mapping file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from xarch_kd.mapping_file.scalars import ConfigModel


class Mamba2Options(ConfigModel):
    """Sizes of converted Mamba-2 mixers that other programs require.

    `expand` is the mixers' channels divided by the hidden size (default: the smallest that holds the heads),
    `proj_bias: false` leaves out the biases of their projections, and `n_groups` is the number of groups of heads that
    share B, C and the norm (default: each head has its own). llama.cpp requires `expand: 2` and `proj_bias: false`,
    mlx-lm `n_groups: 1`.
    """

    expand: Annotated[int, Field(ge=1)] | None = None
    proj_bias: bool = True
    n_groups: Annotated[int, Field(ge=1)] | None = None
