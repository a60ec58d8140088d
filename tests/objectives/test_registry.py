"""A name without a class or a formula is an error at import."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from xarch_kd.errors import XarchError, check_table
from xarch_kd.mapping_file.losses import FEATURE_TAPS, LOSS_OPTIONS, Cosine, CustomLossOptions, Huber, Tap
from xarch_kd.mapping_file.schema import MixerName
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.objectives.registry import OBJECTIVES


def test_a_table_that_lacks_a_name_or_has_one_too_many_is_refused() -> None:
    without = {options: objective for options, objective in OBJECTIVES.items() if options is not Huber}
    with pytest.raises(XarchError, match=r"objective classes(.|\n)*missing: Huber; without a name: none"):
        check_table("objective classes", without, LOSS_OPTIONS)
    with pytest.raises(XarchError, match="missing: none; without a name: Cosine"):
        check_table("objective classes", [Huber, Cosine], [Huber])
    # A third mixer's name alone does not get the recipe of another.
    with pytest.raises(XarchError, match="missing: rwkv"):
        check_table("mixers to convert to", {*RECIPES, "window"}, (*get_args(MixerName), "rwkv"))


def test_every_loss_names_taps_that_exist_and_every_tap_has_a_loss() -> None:
    taps = set(get_args(Tap))
    built_in = [options for options in LOSS_OPTIONS if options is not CustomLossOptions]
    assert {tap for options in built_in for tap in options.taps} == taps == set(CustomLossOptions.taps)
    assert taps - set(FEATURE_TAPS) == {"values", "mixing"}
    kinds = [kind for options in LOSS_OPTIONS for kind in get_args(options.model_fields["kind"].annotation)]
    assert len(set(kinds)) == len(kinds) and all(re.fullmatch(r"[a-z0-9_]+", kind) for kind in kinds)
