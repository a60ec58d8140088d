"""Choice of how the documents of packed rows are kept apart: by position ids, or as rows of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from xarch_kd.mapping_file.losses import DistanceOptions
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.taps.layout import Layout, run_base
from xarch_kd.taps.mamba_ssm import is_mamba_ssm_model
from xarch_kd.taps.sites import MIXING_TAPS
from xarch_kd.training.stage_setup import evaluation_mode

# Tokens of each of the two documents of a probe.
PROBE_TOKENS: Final = 8
# Largest relative difference between a document in a packed row and alone, by the size of the model's numbers.
TOLERANCES: Final = {4: 1e-3, 2: 5e-2}


def splitting_reason(entries: Iterable[Align], models: Iterable[Layout]) -> str | None:
    """Return why documents of packed rows need rows of their own, None where position ids keep them apart exactly.

    Position ids are enough if every objective compares token with token, and if both models attend to the tokens of a
    document alone. The latter is measured on two short documents.
    """
    for entry in entries:
        if not isinstance(entry.loss, DistanceOptions) or entry.tap in MIXING_TAPS:
            return f"'{entry.name}' compares the tokens of a row with each other"
    for layout in models:
        name = type(layout.model).__name__
        recurrent = sorted(set(layout.mixer_kinds) - {"attention"})
        if recurrent or is_mamba_ssm_model(layout.model):
            return f"{name} has mixers of kind {', '.join(recurrent) or 'mamba_ssm'}, whose state runs through a row"
        if not keeps_documents_apart(layout):
            return f"{name} does not keep documents apart by position ids"
    return None


@torch.no_grad()
def keeps_documents_apart(layout: Layout) -> bool:
    """Return True if a model reads two documents of a row with restarted positions as it reads each of them alone."""
    weight = next(layout.base.parameters())
    embedding: Any = layout.embedding.weight
    vocabulary = int(embedding.shape[0])
    ids = torch.arange(3 * PROBE_TOKENS, device=weight.device).view(3, PROBE_TOKENS) % vocabulary
    positions = torch.arange(PROBE_TOKENS, device=weight.device).repeat(1, 2)
    with evaluation_mode(layout.model):
        alone = run_base(layout, ids[1:2]).float()
        packed = [
            run_base(layout, torch.cat((first, ids[1:2]), 1), position_ids=positions)[:, PROBE_TOKENS:].float()
            for first in (ids[:1], ids[2:])
        ]
    tolerance = TOLERANCES.get(weight.element_size(), TOLERANCES[2])
    return all(_close(found, expected, tolerance) for found, expected in ((packed[0], alone), (packed[1], packed[0])))


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())
