"""Token-mixing matrices of a few layers and heads, recorded at the end of training for the report."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xarch_kd.data.rows import Rows, first_rows
from xarch_kd.errors import XarchError
from xarch_kd.files import write_tensors
from xarch_kd.job.models import RunModels
from xarch_kd.planning.plan import Plan
from xarch_kd.plots.matrices import HEADS, LAYERS, spread
from xarch_kd.run.folder import RunFolder
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.trace import trace

TOKENS: Final = 64


def record_mixing(plan: Plan, models: RunModels, rows: Rows, folder: RunFolder, reporter: Reporter) -> None:
    """Write matrices [time, time] of both models on the first training row, by side, layer and head.

    Up to three pairs of layers that learn from each other, or replaced layers, and two heads of each, evenly spaced; of
    a model with fewer heads, the head at the same fraction. Nothing is written for models without such a tap.
    """
    pairs = layer_pairs(plan)
    if not pairs:
        return
    batch = next(iter(first_rows(rows, 1).batches(1, origin="training text")))
    ids = batch.input_ids[:1, :TOKENS]
    found: dict[str, Tensor] = {}
    try:
        sides = {}
        for side, model, paths, column in (
            ("teacher", models.teacher, plan.mapping.teacher.paths, 1),
            ("student", models.student, plan.mapping.student.paths, 0),
        ):
            layers = sorted({pair[column] for pair in pairs})
            was_training = model.training
            model.eval()
            try:
                with torch.no_grad():
                    seen = trace(layout_of(model, paths), ids.to(model.device), taps={"mixing": layers})
            finally:
                model.train(was_training)
            sides[side] = seen["mixing"]
        for own, other in pairs:
            dense = {
                "teacher": (other, sides["teacher"][other].dense()[0]),
                "student": (own, sides["student"][own].dense()[0]),
            }
            most = max(len(matrix) for _, matrix in dense.values())
            for head in spread(list(range(most)), HEADS):
                for side, (layer, matrix) in dense.items():
                    index = head * len(matrix) // most
                    found[f"{len(found):02d}.{side}.{layer}.{index}"] = matrix[index].float()
    except XarchError as error:
        reporter.line(f"no mixing matrices in the report: {error.message}")
        return
    write_tensors(folder.mixing, found)


def layer_pairs(plan: Plan) -> list[tuple[int, int]]:
    """Return up to three (student layer, teacher layer) that are compared, evenly spaced."""
    pairs: dict[int, tuple[float, int]] = {}
    for pair in (pair for stage in plan.stages for pair in stage.pairs):
        if pair.student_layer is None or pair.teacher_layer is None:
            continue
        before = pairs.get(pair.student_layer)
        if before is None or pair.weight > before[0]:
            pairs[pair.student_layer] = (pair.weight, pair.teacher_layer)
    replaced = [row.index for row in plan.student.layers if row.replaced]
    if replaced and len(plan.student.layers) == len(plan.teacher.layers):
        return [(layer, layer) for layer in spread(replaced, LAYERS)]
    return [(layer, pairs[layer][1]) for layer in spread(sorted(pairs), LAYERS)]
