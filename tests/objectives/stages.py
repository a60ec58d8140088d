"""One-stage plans, and what both models give at the sites of a pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.taps.trace import trace
from xarch_kd.training.aligner import Aligner

Build = Callable[..., Aligner]
TOKENS = 2 * 16


def plan_of(
    folders: dict[str, Path],
    *align: dict[str, Any],
    student: str = "mamba2",
    objectives: dict[str, Any] | None = None,
    **stage: Any,
) -> Plan:
    mapping = {
        "version": 1,
        "teacher": {"model": str(folders["teacher"])},
        "student": {"model": str(folders[student])},
        "data": {"builtin": "python-docs", "sequence_length": 16, "batch_size": 2},
        "stages": [{"name": "one", "steps": 10, "train": ["all"], "align": list(align), **stage}],
    }
    # Through JSON, whose lists a strict model takes as tuples.
    return make_plan(MappingFile.model_validate_json(json.dumps(mapping)), objectives=objectives)


def entry(tap: str = "hidden", layers: Any = "uniform", name: str = "e", **more: Any) -> dict[str, Any]:
    return {"name": name, "tap": tap, "layers": layers, **more}


def both(aligner: Aligner, teacher: PreTrainedModel, ids: Tensor, tap: str, pair: tuple[int, int]) -> tuple[Any, Any]:
    own = trace(aligner.student, ids, taps=[tap], layers=[pair[0]])[tap][pair[0]]
    return own, trace(teacher, ids, taps=[tap], layers=[pair[1]])[tap][pair[1]]


# uniform, 2 student blocks on 4: block 0 learns from 1, block 1 from 3.
PAIRS = ((0, 1), (1, 3))


def token_rows(count: int) -> Tensor:
    return torch.randint(2, 97, (count, 16), generator=torch.Generator().manual_seed(7))


def batches(count: int, *, padding: int = 0) -> tuple[Batch, ...]:
    ids = functional.pad(token_rows(count), (0, padding), value=1)
    mask = torch.arange(ids.shape[1]).expand_as(ids) < ids.shape[1] - padding
    parts = zip(ids.split(2), mask.split(2), strict=True)
    return tuple(Batch(input_ids=rows, attention_mask=own) for rows, own in parts)
