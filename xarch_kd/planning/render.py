"""Rendering of a plan: rich tables for people, plain data for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xarch_kd.display import byte_text, count_text, duration, ranges
from xarch_kd.layer_mapping import similarity_text_plot
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.models.serving import SERVING_COLUMNS
from xarch_kd.planning.plan import LayerRow, ModelSummary, PairPlan, Plan, StagePlan
from xarch_kd.planning.render_selection import render_selection

# Pairs that a plan's `repr` lists.
SUMMARY_PAIRS = 8


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON-ready data: what `plan --json` prints and what a run folder's `plan.json` holds."""
    return {
        "path": None if plan.path is None else str(plan.path),
        "mapping": plan.mapping.model_dump(mode="json"),
        "teacher": dataclasses.asdict(plan.teacher),
        "student": dataclasses.asdict(plan.student),
        "student_config": _finite(plan.student_config),
        "conversion": None if plan.conversion is None else plan.conversion.model_dump(mode="json"),
        "selection": None if plan.selection is None else plan.selection.as_dict(),
        "stages": [_stage_as_dict(stage) for stage in plan.stages],
        "warnings": list(plan.warnings),
        "timing_assumptions": plan.timing_assumptions,
        "disk_bytes": dataclasses.asdict(plan.disk),
        "similarities": {name: [list(row) for row in matrix] for name, matrix in plan.similarities.items()},
        "custom": plan.custom.qualified_names(),
        "served_by": [dict(zip(SERVING_COLUMNS, row, strict=True)) for row in plan.serving],
    }


def render_plan(plan: Plan) -> RenderableType:
    """Return a plan as tables: both models, their blocks, the stages, the pairs, notices."""
    parts: list[RenderableType] = [_models(plan), Text(""), _blocks(plan), Text("")]
    if plan.selection is not None:
        parts += [render_selection(plan.selection), Text("")]
    parts += [_stages(plan), Text("")]
    if any(stage.pairs for stage in plan.stages):
        parts += [_pairs(plan), Text("")]
    drawn = dict.fromkeys(plot for stage in plan.stages for _, plot in stage.layer_map_plots)
    if any(not plot.startswith(("same:", "replaced:")) for plot in drawn):
        parts += [part for plot in drawn for part in (Text(plot), Text(""))]
    for name, matrix in plan.similarities.items():
        parts += [Text(similarity_text_plot(f"similarity (CKA) for {name}", torch.tensor(matrix))), Text("")]
    if plan.serving:
        parts += [_serving(plan), Text("")]
    parts.append(Text(f"Time: {plan.timing_assumptions}.", style="dim"))
    parts.append(Text(f"Disk: {disk_line(plan)}.", style="dim"))
    parts += [Text(f"notice: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts)


def render_summary(plan: Plan) -> RenderableType:
    """Return a plan in few lines: both models, the stages, the first pairs, the number of notices."""
    parts: list[RenderableType] = [_models(plan), Text(""), _stages(plan)]
    replaced = [row.index for row in plan.student.layers if row.replaced]
    if replaced:
        parts.insert(1, Text(f"replaced blocks: {ranges(replaced)}"))
    if any(stage.pairs for stage in plan.stages):
        parts += [Text(""), _pairs(plan, limit=SUMMARY_PAIRS)]
    if plan.warnings:
        parts.append(Text(f"{len(plan.warnings)} notices: see plan.warnings"))
    return Group(*parts)


def disk_line(plan: Plan) -> str:
    """Return the forecast of the run folder's size, in one line."""
    return (
        f"up to {byte_text(plan.disk.peak)} in the run folder while it trains, {byte_text(plan.disk.kept)} at the end"
    )


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if column != name else "left", overflow="fold")
    return table


def _models(plan: Plan) -> Table:
    table = _table("", "model", "type", ">blocks", ">dim", ">vocabulary", ">parameters", "dtype", title="Models")
    for name, model in (("teacher", plan.teacher), ("student", plan.student)):
        table.add_row(
            name,
            Text(model.reference),
            model.model_type,
            str(len(model.layers)),
            str(model.dim),
            str(model.vocabulary),
            count_text(model.parameters),
            model.dtype,
        )
    return table


def _blocks(plan: Plan) -> Table:
    """Return a table of the blocks of both models; equal neighbors share a row, equal depths are side by side."""
    table = _table("blocks", "teacher", "student", "", title="Blocks")
    teacher, student = plan.teacher, plan.student
    if len(teacher.layers) == len(student.layers):
        rows = zip(teacher.layers, student.layers, strict=True)
        for key, run in groupby(rows, key=lambda pair: (pair[0].mixer, pair[1].mixer, pair[1].replaced)):
            mark = Text("replaced" if key[2] else "", style="bold")
            table.add_row(ranges([own.index for own, _ in run]), key[0], key[1], mark)
        return table
    for mixer, span in _runs(teacher):
        table.add_row(span, mixer, "", "")
    for mixer, span in _runs(student):
        table.add_row(span, "", mixer, "")
    return table


def _runs(model: ModelSummary) -> Iterator[tuple[str, str]]:
    def mixer(row: LayerRow) -> str:
        return row.mixer

    for kind, run in groupby(model.layers, key=mixer):
        yield kind, ranges([row.index for row in run])


def _stages(plan: Plan) -> Table:
    columns = ("stage", "inputs", "trains", ">parameters", ">steps", ">batch", ">tokens", "objectives", "cache")
    table = _table(*columns, ">memory", ">time", title="Stages")
    for stage in plan.stages:
        accumulated = f" x {stage.stage.gradient_accumulation}" if stage.stage.gradient_accumulation > 1 else ""
        table.add_row(
            stage.folder,
            stage.stage.inputs,
            ", ".join([*stage.stage.parts, *(() if stage.stage.lora is None else [f"lora {stage.stage.lora.rank}"])]),
            count_text(stage.trainable_parameters),
            f"{stage.stage.epochs:g} epochs" if stage.is_open else str(stage.steps),
            f"{stage.batch_size}{accumulated}",
            f"{count_text(stage.tokens)} per step" if stage.is_open else count_text(stage.tokens),
            _objectives(stage),
            f"{byte_text(stage.cache_bytes)} {stage.stage.cache_place}" if stage.cache_bytes else "off",
            byte_text(stage.peak_bytes),
            f"{duration(stage.seconds)} per step" if stage.is_open else duration(stage.seconds),
        )
    if len(plan.stages) > 1:
        peak = max(stage.peak_bytes for stage in plan.stages)
        seconds = sum(stage.seconds for stage in plan.stages)
        tokens = sum(stage.tokens for stage in plan.stages)
        sums = (count_text(tokens), duration(seconds))
        if any(stage.is_open for stage in plan.stages):
            sums = ("depends on the text",) * 2
        table.add_row("together", "", "", "", "", "", sums[0], "", "", byte_text(peak), sums[1], style="bold")
    return table


def _objectives(stage: StagePlan) -> str:
    parts = [f"{align.name} ({align.loss.label})" for align in stage.stage.align if _of(align.name, stage.pairs)]
    tokens = stage.stage.tokens
    if tokens is not None:
        if tokens.weight:
            parts.append(f"{tokens.divergence_label} at T={tokens.temperature:g}, weight {tokens.weight:g}")
        if tokens.cross_entropy:
            parts.append(f"cross-entropy, weight {tokens.cross_entropy:g}")
    evaluation, average = stage.stage.evaluation, stage.stage.ema
    if evaluation is not None:
        kept = ", best kept" if evaluation.keep == "best" else ""
        parts.append(f"held-out {evaluation.metric} every {evaluation.every} steps{kept}")
    if average is not None:
        parts.append(f"moving average of weights, decay {average.decay:g}")
    return "; ".join(parts)


def _of(align: str, pairs: Iterable[PairPlan]) -> bool:
    return any(pair.align == align for pair in pairs)


def _pairs(plan: Plan, limit: int | None = None) -> Table:
    """Pairs of every stage; with a limit the first ones, and how many follow."""
    columns = ("stage", "pair", "tap", "student", "teacher", "projector", "loss", ">weight")
    table = _table(*columns, title="Pairs (block: batch, time, dim or batch, heads, time × time)")
    length = plan.mapping.data.sequence_length
    pairs = [(stage, pair) for stage in plan.stages for pair in stage.pairs]
    for stage, pair in pairs[:limit]:
        projector = pair.projector
        if pair.projector_parameters:
            projector += f", {count_text(pair.projector_parameters)} parameters"
        table.add_row(
            stage.stage.name,
            pair.name,
            pair.tap,
            _shape(stage, length, pair.tap, pair.student_layer, pair.student_dim, pair.student_heads),
            _shape(stage, length, pair.tap, pair.teacher_layer, pair.teacher_dim, pair.teacher_heads),
            projector,
            stage.align_of(pair).loss.label,
            _weight(stage.align_of(pair), pair),
        )
    if limit is not None and len(pairs) > limit:
        table.add_row("…", f"and {len(pairs) - limit} more pairs")
    return table


def _serving(plan: Plan) -> Table:
    """Return a table of the servers that run a student of this class and config."""
    table = _table(*SERVING_COLUMNS, title=f"Servers of a {plan.student.model_type}")
    for row in plan.serving:
        table.add_row(*map(Text, row))
    return table


def _weight(align: Align, pair: PairPlan) -> str:
    changes = "" if align.schedule is None else f", {align.schedule.kind}"
    if align.loss.weight != "auto":
        return f"{pair.weight:g}{changes}"
    return (f"auto × {pair.weight:g}" if pair.weight != 1 else "auto") + changes


def _shape(stage: StagePlan, length: int, tap: str, layer: int | None, dim: int, heads: int | None) -> str:
    block = "" if layer is None else f"{layer}: "
    if tap == "mixing":
        return f"{block}({stage.batch_size}, {'heads' if heads is None else heads}, {length} × {length})"
    return f"{block}({stage.batch_size}, {length}, {dim})"


def _finite(value: Any) -> Any:
    """Return JSON-ready data: JSON has no infinity, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _stage_as_dict(stage: StagePlan) -> dict[str, Any]:
    values = {entry.name: getattr(stage, entry.name) for entry in dataclasses.fields(stage)}
    return {
        **values,
        "folder": stage.folder,
        "stage": stage.stage.model_dump(mode="json"),
        "pairs": [dataclasses.asdict(pair) for pair in stage.pairs],
        "layer_map_plots": dict(stage.layer_map_plots),
        "trainable": list(stage.trainable),
        "lora": None
        if stage.lora is None
        else {"modules": list(stage.lora.modules), "parameters": stage.lora.parameters},
    }
