"""What the student gives for each match of a stage: in one pass, or block by block on what the teacher's were fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from xarch_kd.mapping_file.objectives import MIXER_TAPS
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.objectives.alignment import ActivePair
from xarch_kd.objectives.base import tensor
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.replay import block_calls, read_block, read_mixer
from xarch_kd.taps.sites import Site
from xarch_kd.taps.trace import trace
from xarch_kd.teacher.feature_cache import Feature, Features

HEAD_INPUT: Final = Site("head_input", None)
StudentFeatures = Mapping[Site, Feature]


def block_input_site(stage: Stage, active_pairs: Sequence[ActivePair], reading: ActivePair) -> Site:
    """Return the teacher's site that the student's block of a reading is fed with `inputs: teacher`."""
    layer = reading.site.layer or 0
    if _mixer_alone(stage, active_pairs, reading.student_layer):
        return Site("mixer_input", layer)
    return Site("hidden", layer - 1) if layer else Site("embedding", None)


def _mixer_alone(stage: Stage, active_pairs: Sequence[ActivePair], student_layer: int | None) -> bool:
    """Whether running the mixer is enough: nothing but its output is matched and nothing around it learns."""
    taps = {reading.site.tap for reading in active_pairs if reading.student_layer == student_layer}
    return taps <= MIXER_TAPS and set(stage.train) == {"mixers"}


def traced(
    layout: Layout, stage: Stage, active_pairs: Sequence[ActivePair], input_ids: Tensor, attention_mask: Tensor | None
) -> StudentFeatures:
    """Return what one pass of the student gives at the sites of the readings, and its head input for the tokens."""
    taps: dict[str, list[int]] = {}
    for reading in active_pairs:
        layer = reading.student_layer
        taps.setdefault(reading.site.tap, []).extend([] if layer is None else [layer])
    if stage.tokens is not None:
        taps.setdefault(HEAD_INPUT.tap, [])
    found = trace(layout, input_ids, attention_mask, taps=taps)
    sites = [Site(reading.site.tap, reading.student_layer) for reading in active_pairs]
    sites += [HEAD_INPUT] if stage.tokens is not None else []
    return {site: found.at(*site) for site in sites}


def replayed(
    layout: Layout,
    stage: Stage,
    active_pairs: Sequence[ActivePair],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    features: Features,
) -> Mapping[tuple[Site, Site], Feature]:
    """Return what each student block, or its mixer alone, gives on what the teacher's was fed.

    By (the student's site, the teacher's site that fed it).
    """
    calls = block_calls(layout, input_ids, attention_mask)
    groups: dict[tuple[int, Site], set[str]] = {}
    for reading in active_pairs:
        if reading.student_layer is not None:
            feed = block_input_site(stage, active_pairs, reading)
            groups.setdefault((reading.student_layer, feed), set()).add(reading.site.tap)
    found: dict[tuple[Site, Site], Feature] = {}
    for (layer, feed), taps in groups.items():
        fed = tensor(features[feed]).to(next(layout.blocks[layer].parameters()).dtype)
        run = read_mixer if feed.tap == "mixer_input" else read_block
        read = run(layout, layer, fed, calls, sorted(taps))
        found.update({(Site(tap, layer), feed): feature for tap, feature in read.items()})
    return found
