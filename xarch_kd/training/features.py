"""The teacher's features of a batch: read once by a trace, and kept if the stage has a cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xarch_kd.errors import CheckpointError
from xarch_kd.taps.layout import Layout
from xarch_kd.taps.sites import WHOLE_TAPS, Site
from xarch_kd.taps.trace import trace

Features = dict[Site, Tensor]


class FeatureCache(Protocol):
    """Features by batch number, in the dtype the teacher gave them, so that a hit equals a fresh pass bit for bit."""

    def get(self, batch: int) -> Features | None: ...
    def put(self, batch: int, features: Features) -> None: ...


class MemoryCache:
    """Features kept in main memory, whatever device the teacher runs on."""

    def __init__(self) -> None:
        self._kept: dict[int, Features] = {}

    def get(self, batch: int) -> Features | None:
        """Return the features of `batch`, or None."""
        return self._kept.get(batch)

    def put(self, batch: int, features: Features) -> None:
        """Keep the features of `batch`."""
        self._kept[batch] = {site: tensor.detach().cpu() for site, tensor in features.items()}


class DiskCache:
    """Features in one safetensors file a batch; a file that is not whole is read again from the teacher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: int) -> Features | None:
        """Return the features of `batch`, or None when they are not there or not readable."""
        path = self._path(batch)
        if not path.exists():
            return None
        try:
            stored = load_file(path)
        except (SafetensorError, OSError):
            return None
        return {_site(name): tensor for name, tensor in stored.items()}

    def put(self, batch: int, features: Features) -> None:
        """Keep the features of `batch`. Raises CheckpointError when the disk is full."""
        path = self._path(batch)
        partial = path.with_suffix(".partial")
        try:
            save_file({_name(site): tensor.detach().cpu().contiguous() for site, tensor in features.items()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno != errno.ENOSPC:
                raise
            raise CheckpointError(
                "the teacher's features cannot be kept on disk",
                found=str(error),
                fix="free some space, or set the stage's cache to memory or off, then run again with --resume",
            ) from error

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.safetensors"


def _name(site: Site) -> str:
    return site.tap if site.layer is None else f"{site.tap}.{site.layer}"


def _site(name: str) -> Site:
    tap, _, layer = name.partition(".")
    return Site(tap, int(layer) if layer else None)


class TeacherReader:
    """Reads the frozen teacher at `sites`, through `cache` if there is one."""

    def __init__(self, layout: Layout, sites: Sequence[Site], cache: FeatureCache | None = None) -> None:
        self.layout = layout
        self.sites = tuple(dict.fromkeys(sites))
        self.cache = cache
        layout.model.eval().requires_grad_(False)

    @property
    def taps(self) -> Mapping[str, list[int] | None]:
        """The sites as the mapping that `trace` takes."""
        asked: dict[str, list[int] | None] = {}
        for tap, layer in self.sites:
            if tap in WHOLE_TAPS or layer is None:
                asked[tap] = None
            else:
                layers = asked.setdefault(tap, [])
                if layers is not None:
                    layers.append(layer)
        return asked

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, batch: int | None = None) -> Features:
        """Return the tensors [batch, time, width] at the sites, on the device of `input_ids`; no gradients.

        `batch` is the batch's number in the stage; without it nothing is looked up or kept.
        """
        kept = self.cache.get(batch) if self.cache is not None and batch is not None else None
        if kept is not None and set(kept) >= set(self.sites):
            return {site: kept[site].to(input_ids.device) for site in self.sites}
        with torch.no_grad():
            traced = trace(self.layout, input_ids, attention_mask, taps=self.taps)
        features = {site: traced.at(*site) for site in self.sites}
        if self.cache is not None and batch is not None:
            self.cache.put(batch, features)
        return features
