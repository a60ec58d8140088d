"""Caches of teacher features, in memory and on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from xarch_kd.errors import CheckpointError
from xarch_kd.files import read_tensors, write_tensors
from xarch_kd.mixing import (
    BandedMixing,
    DeltaMixing,
    LinearMixing,
    Mixing,
    SelectiveMixing,
    SoftmaxMixing,
    SSDMixing,
)
from xarch_kd.taps.recording import Feature
from xarch_kd.taps.sites import Site

Features = dict[Site, Feature]


MIXINGS = {
    kind.kind: kind for kind in (SoftmaxMixing, SSDMixing, SelectiveMixing, LinearMixing, DeltaMixing, BandedMixing)
}


class FeatureCache(Protocol):
    """Features by key (`feature_key`), in the dtype of the teacher, so that a hit equals a fresh pass bit for bit."""

    def get(self, key: str) -> Features | None: ...
    def put(self, key: str, features: Features) -> None: ...


def feature_key(batch: str, teacher: str) -> str:
    """Return the key of features, from the fingerprints of the batch and of the teacher that they were read from."""
    return hashlib.sha256(f"{batch} {teacher}".encode()).hexdigest()


class MemoryCache:
    """Features kept in main memory, whatever device the teacher runs on.

    With a `limit` in bytes, features that would exceed it are not kept, so that they are read from the teacher again.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._kept: dict[str, Features] = {}
        self._limit = limit
        self._bytes = 0

    def get(self, key: str) -> Features | None:
        """Return the features of `key`, or None."""
        return self._kept.get(key)

    def put(self, key: str, features: Features) -> None:
        """Keep the features under `key`."""
        size = sum(_bytes_of(feature) for feature in features.values())
        known = sum(_bytes_of(feature) for feature in self._kept.get(key, {}).values())
        if self._limit is not None and self._bytes + size - known > self._limit:
            return
        self._kept[key] = {site: moved(feature, "cpu") for site, feature in features.items()}
        self._bytes += size - known


class DiskCache:
    """Features in one safetensors file per batch, named by its key; a damaged file or one of another key is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Features | None:
        """Return the features of `key`, or None when they are not there or not as they were written."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            stored, described = read_tensors(path)
        except CheckpointError:
            return None
        return _unpacked(stored, json.loads(described["mixings"])) if described.get("key") == key else None

    def put(self, key: str, features: Features) -> None:
        """Keep the features under `key`. Raises CheckpointError when the disk is full."""
        tensors, plain = _packed(features)
        try:
            write_tensors(self._path(key), tensors, {"key": key, "mixings": json.dumps(plain)})
        except CheckpointError as error:
            raise CheckpointError(
                "the teacher's features cannot be kept on disk",
                asked=error.asked,
                found=error.found,
                fix="free some space, or set the stage's cache to memory or off, then run again with --resume",
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def moved(feature: Feature, device: torch.device | str) -> Feature:
    """Return a feature on `device`, without its graph."""
    if isinstance(feature, Tensor):
        return feature.detach().to(device)
    tensors = {name: value.detach().to(device) for name, value in _fields(feature).items() if isinstance(value, Tensor)}
    return dataclasses.replace(feature, **tensors)


def of_other_rows(feature: Feature) -> Feature:
    """Return a feature whose row i of the batch is that of row i + 1, and the last that of the first.

    The feature of a single row is shifted by half of its tokens instead, [batch, time, ...] as it is.
    """
    if isinstance(feature, Tensor):
        return _moved_on(feature)
    # Factors that all rows share, such as A, D and taps, have no axes of batch and time.
    tensors = {
        name: value.roll(-1, 0) if value.ndim < 3 else _moved_on(value)
        for name, value in _fields(feature).items()
        if isinstance(value, Tensor) and (value.ndim >= 3 or name == "valid_range")
    }
    return dataclasses.replace(feature, **tensors)


def _moved_on(value: Tensor) -> Tensor:
    return value.roll(-1, 0) if len(value) > 1 else value.roll(value.shape[1] // 2, 1)


def _bytes_of(feature: Feature) -> int:
    tensors = [feature] if isinstance(feature, Tensor) else _fields(feature).values()
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))


def _fields(mixing: Mixing) -> dict[str, Any]:
    return {entry.name: getattr(mixing, entry.name) for entry in dataclasses.fields(mixing)}


def _packed(features: Features) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return features as named tensors, and the other fields of their mixing matrices."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for site, feature in features.items():
        held = moved(feature, "cpu")
        if isinstance(held, Tensor):
            tensors[_name(site)] = held.contiguous()
            continue
        plain[_name(site)] = {"kind": held.kind}
        for name, value in _fields(held).items():
            if isinstance(value, Tensor):
                # A factor may be an expanded view of fewer numbers, or share them with another.
                tensors[f"{_name(site)}/{name}"] = value.clone(memory_format=torch.contiguous_format)
            else:
                plain[_name(site)][name] = value
    return tensors, plain


def _unpacked(tensors: Mapping[str, Tensor], plain: Mapping[str, dict[str, Any]]) -> Features:
    found: Features = {_site(name): tensor for name, tensor in tensors.items() if "/" not in name}
    for name, values in plain.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        kind = MIXINGS[values["kind"]]
        found[_site(name)] = kind(**own, **{key: value for key, value in values.items() if key != "kind"})
    return found


def _name(site: Site) -> str:
    return site.tap if site.layer is None else f"{site.tap}.{site.layer}"


def _site(name: str) -> Site:
    tap, _, layer = name.partition(".")
    return Site(tap, int(layer) if layer else None)
