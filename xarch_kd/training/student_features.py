"""Student features of a stage's pairs: from one pass, or block by block on the inputs of the teacher's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xarch_kd.data.batches import Batch
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.objectives.alignment import ActivePair
from xarch_kd.objectives.base import tensor
from xarch_kd.objectives.next_token import HEAD_INPUT
from xarch_kd.planning.block_inputs import block_input
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.replay import block_calls, read_block, read_mixer
from xarch_kd.taps.sites import Site
from xarch_kd.taps.trace import trace
from xarch_kd.teacher.feature_cache import Feature, Features

StudentFeatures = Mapping[Site, Feature]


def block_input_site(stage: Stage, active_pairs: Sequence[ActivePair], pair: ActivePair) -> Site:
    """Return the teacher's site whose feature is the input of a pair's student block under `inputs: teacher`."""
    taps = (other.site.tap for other in active_pairs if other.student_layer == pair.student_layer)
    return block_input(stage, taps, pair.site.layer)


def traced(layout: Layout, stage: Stage, active_pairs: Sequence[ActivePair], batch: Batch) -> StudentFeatures:
    """Return the features of one pass of the student at the sites of the pairs, and its head input for the tokens."""
    taps: dict[str, list[int]] = {}
    for pair in active_pairs:
        layer = pair.student_layer
        taps.setdefault(pair.site.tap, []).extend([] if layer is None else [layer])
    if stage.tokens is not None:
        taps.setdefault(HEAD_INPUT.tap, [])
    found = trace(layout, batch.input_ids, batch.model_mask, taps=taps, position_ids=batch.position_ids)
    sites = [Site(pair.site.tap, pair.student_layer) for pair in active_pairs]
    sites += [HEAD_INPUT] if stage.tokens is not None else []
    return {site: found.at(*site) for site in sites}


def replayed(
    layout: Layout, stage: Stage, active_pairs: Sequence[ActivePair], batch: Batch, features: Features
) -> Mapping[tuple[Site, Site], Feature]:
    """Return the features of each student block, or of its mixer alone, run on the input of the teacher's block.

    Keys are (the student's site, the teacher's site that was its input).
    """
    calls = block_calls(layout, batch.input_ids, batch.model_mask, position_ids=batch.position_ids)
    groups: dict[tuple[int, Site], set[str]] = {}
    for pair in active_pairs:
        if pair.student_layer is not None:
            source = block_input_site(stage, active_pairs, pair)
            groups.setdefault((pair.student_layer, source), set()).add(pair.site.tap)
    found: dict[tuple[Site, Site], Feature] = {}
    for (layer, source), taps in groups.items():
        block_input = tensor(features[source]).to(next(layout.blocks[layer].parameters()).dtype)
        run = read_mixer if source.tap == "mixer_input" else read_block
        read = run(layout, layer, block_input, calls, sorted(taps))
        found.update({(Site(tap, layer), source): feature for tap, feature in read.items()})
    return found
