"""Readers of the mixing matrices of recurrent mixers, by the name of the mixer's class."""

from __future__ import annotations

from typing import Final

from xarch_kd.taps.readers.base import MixingReader

__all__ = ["READERS", "MixingReader"]

READERS: Final[dict[str, MixingReader]] = {}
