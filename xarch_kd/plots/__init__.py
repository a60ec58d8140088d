"""Figures of plans, runs and models: each function returns a matplotlib figure.

matplotlib is imported when a figure is made.

>>> import torch
>>> import xarch_kd as xkd
>>> figure = xkd.plots.similarity(torch.eye(3))
>>> figure.savefig("similarity.svg")
"""

from __future__ import annotations

from xarch_kd.plots.layer_maps import layer_map
from xarch_kd.plots.matrices import mixing, similarity
from xarch_kd.plots.training import curves

__all__ = ["curves", "layer_map", "mixing", "similarity"]
