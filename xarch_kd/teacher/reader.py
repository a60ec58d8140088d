"""Reader of the frozen teacher's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xarch_kd.taps.layout import Layout
from xarch_kd.taps.sites import WHOLE_TAPS, Site
from xarch_kd.taps.trace import trace
from xarch_kd.teacher.feature_cache import FeatureCache, Features, _moved


class TeacherFeatures:
    """Reads the frozen teacher at `sites`, through `cache` if there is one."""

    def __init__(self, layout: Layout, sites: Sequence[Site], cache: FeatureCache | None = None) -> None:
        self.layout = layout
        self.sites = tuple(dict.fromkeys(sites))
        self.cache = cache
        layout.model.eval().requires_grad_(False)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        batch: int | None = None,
        sites: Sequence[Site] | None = None,
    ) -> Features:
        """Return what is at `sites` (None: all of the reader's), on the device of `input_ids`, without gradients.

        That is a tensor [batch, time, dim], or a Mixing at the tap `mixing`.
        `batch` is the batch's number in the stage; without it nothing is looked up or kept.
        """
        wanted = self.sites if sites is None else tuple(sites)
        kept = self.cache.get(batch) if self.cache is not None and batch is not None else None
        if kept is not None and set(kept) >= set(wanted):
            return {site: _moved(kept[site], input_ids.device) for site in wanted}
        with torch.no_grad():
            traced = trace(self.layout, input_ids, attention_mask, taps=_taps(wanted))
        features = {site: traced.at(*site) for site in wanted}
        if self.cache is not None and batch is not None:
            # Sites of earlier steps stay: a layer map that is drawn anew may come back to them.
            self.cache.put(batch, (kept or {}) | features)
        return features


def _taps(sites: Sequence[Site]) -> Mapping[str, list[int] | None]:
    """Return sites as the mapping that `trace` takes."""
    asked: dict[str, list[int] | None] = {}
    for tap, layer in sites:
        if tap in WHOLE_TAPS or layer is None:
            asked[tap] = None
        else:
            layers = asked.setdefault(tap, [])
            if layers is not None:
                layers.append(layer)
    return asked
