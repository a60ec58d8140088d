"""Features of the frozen teacher, read live or from a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final

import torch

from xarch_kd.data.batches import Batch
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.sites import WHOLE_TAPS, Site
from xarch_kd.taps.trace import trace
from xarch_kd.teacher.feature_cache import FeatureCache, Features, feature_key, moved

# Values of each weight that a fingerprint reads.
SAMPLED_VALUES: Final = 1024


class TeacherFeatures:
    """Runs the frozen teacher and returns its features at `sites`, through `cache` if there is one.

    Each pass of a cached reader also reads and keeps the sites `ahead`, for the stages that share the cache.
    """

    def __init__(
        self,
        layout: Layout,
        sites: Sequence[Site],
        cache: FeatureCache | None = None,
        *,
        ahead: Sequence[Site] = (),
    ) -> None:
        self.layout = layout
        self.sites = tuple(dict.fromkeys(sites))
        self.cache = cache
        self.ahead = tuple(ahead) if cache is not None else ()
        layout.model.eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the teacher (`teacher_fingerprint`), taken once: weights must not change afterwards."""
        return teacher_fingerprint(self.layout)

    def read(self, batch: Batch, *, sites: Sequence[Site] | None = None) -> Features:
        """Return the features at `sites` (None: all of the reader's), on the device of the batch, without gradients.

        A feature is a tensor [batch, time, dim], or a Mixing at the tap `mixing`. The cache is keyed by the batch's ids
        and mask and the teacher's fingerprint.
        """
        wanted = self.sites if sites is None else tuple(sites)
        key = None if self.cache is None else feature_key(batch.fingerprint, self.fingerprint)
        kept = None if self.cache is None or key is None else self.cache.get(key)
        if kept is not None and set(kept) >= set(wanted):
            return {site: moved(kept[site], batch.device) for site in wanted}
        read = tuple(dict.fromkeys([*wanted, *self.ahead]))
        with torch.no_grad():
            traced = trace(
                self.layout, batch.input_ids, batch.model_mask, taps=_taps(read), position_ids=batch.position_ids
            )
        features = {site: traced.at(*site) for site in read}
        if self.cache is not None and key is not None:
            # Sites of earlier steps stay: a layer map that is redrawn may return to them.
            self.cache.put(key, (kept or {}) | features)
        return {site: features[site] for site in wanted}


@torch.no_grad()
def teacher_fingerprint(layout: Layout) -> str:
    """Return a SHA-256 of the model: its config, and of each parameter and buffer name, shape, dtype and values.

    The modules that taps read belong to it. At most 1024 values of each tensor are read, at equal distances, so that
    the cost does not grow with the model. It covers another checkpoint, training of any length, a conversion and
    another dtype or attention implementation; a change of single entries between the values that are read is not seen.
    """
    model = layout.model
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    # Where the model was loaded from and by which version does not change what it computes.
    settings = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    settings["attention"] = getattr(model.config, "_attn_implementation", None)
    settings["tapped"] = _tapped_modules(layout)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        step = max(1, -(-tensor.numel() // SAMPLED_VALUES))
        values = tensor.detach().reshape(-1)[::step].double().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _tapped_modules(layout: Layout) -> list[str]:
    """Return the paths of the modules whose inputs and outputs are features."""
    names = {id(module): name for name, module in layout.model.named_modules()}
    modules = (
        *(layout.embedding, *layout.blocks, *layout.mixers, *layout.mixer_outputs),
        *(*(layout.mlp_outputs or ()), layout.final_norm),
    )
    return [names.get(id(module), "") for module in modules]


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
