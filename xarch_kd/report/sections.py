"""Sections of a report about the run itself: plan, training, choice of layers, features, cost, provenance."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from xarch_kd.display import byte_text, count_text, duration
from xarch_kd.errors import UsageError
from xarch_kd.plots.layer_maps import layer_map, links
from xarch_kd.plots.matrices import HEADS, mixing_panels, similarity
from xarch_kd.plots.measured import bars
from xarch_kd.plots.training import stage_panels
from xarch_kd.report.content import Folded, Lines, Picture, Section, Table, interval, number
from xarch_kd.report.read import Json, RunRecord

SHOWN_VALUE: Final = 90


def plan_section(run: RunRecord) -> Section:
    """Return the section of the plan: both models, the layer map drawn, the stages."""
    plan = run.plan
    section = Section(name="plan", title="Plan and layer map")
    teacher, student = plan["teacher"], plan["student"]
    replaced = [row["index"] for row in student["layers"] if row["replaced"]]
    entries = links(plan)
    described = "; ".join(
        f"{entry}: " + ", ".join(f"student {own} from teacher {other}" for own, other, _ in pairs[:24])
        for entry, pairs in entries.items()
    )
    section.items.append(
        Picture(
            figure=layer_map(plan),
            caption="Blocks of both models by mixer, replaced ones with an edge; lines: which teacher layer a student "
            "layer learns from.",
            alternative=f"Layer map: {len(teacher['layers'])} teacher blocks, {len(student['layers'])} student blocks, "
            f"{len(replaced)} replaced ({', '.join(map(str, replaced)) or 'none'}). {described or 'No layer pairs.'}",
        )
    )
    rows = [
        ("model", str(teacher["reference"]), str(student["reference"])),
        ("type", str(teacher["model_type"]), str(student["model_type"])),
        ("blocks", str(len(teacher["layers"])), f"{len(student['layers'])}, {len(replaced)} replaced"),
        ("mixers", _mixers(teacher), _mixers(student)),
        ("hidden size", f"{teacher['dim']:,}", f"{student['dim']:,}"),
        ("vocabulary", f"{teacher['vocabulary']:,}", f"{student['vocabulary']:,}"),
        ("parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}"),
        ("dtype", str(teacher["dtype"]), str(student["dtype"])),
    ]
    section.items.append(Table(caption="Models", headings=("", "teacher", "student"), rows=rows))
    section.items.append(Table(caption="Stages", headings=STAGE_COLUMNS, rows=list(_stage_rows(plan))))
    warnings = [str(warning) for warning in plan.get("warnings") or ()]
    if warnings:
        section.items.append(Lines(lines=[f"notice: {warning}" for warning in warnings], as_list=True))
    return section


STAGE_COLUMNS: Final = ("stage", "trains", ">parameters", "objectives", ">pairs", ">steps", ">tokens per step")


def _stage_rows(plan: Json) -> Iterator[tuple[str, ...]]:
    for stage in plan["stages"]:
        asked = stage["stage"]
        objectives = [f"{entry['name']} ({entry['tap']}, {entry['loss']['kind']})" for entry in asked["align"]]
        if asked.get("tokens"):
            objectives.append(f"tokens ({asked['tokens'].get('divergence')})")
        trains = ", ".join(part if isinstance(part, str) else ", ".join(part) for part in asked["train"])
        yield (
            str(asked["name"]),
            trains,
            f"{stage['trainable_parameters']:,}",
            ", ".join(objectives) or "-",
            str(len(stage["pairs"])),
            number(asked.get("steps")),
            f"{stage['tokens_per_step']:,}",
        )


def _mixers(model: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for row in model["layers"]:
        counts[row["mixer"]] = counts.get(row["mixer"], 0) + 1
    return ", ".join(f"{count} {mixer}" for mixer, count in counts.items())


def training_section(run: RunRecord) -> Section:
    """Return the section of the loss curves, one picture per stage."""
    section = Section(name="training", title="Training")
    for stage in run.curves.values():
        if not stage.loss:
            continue
        first, last = min(stage.loss), max(stage.loss)
        held_out = f"; held-out loss at the end {stage.held_out[max(stage.held_out)]:.4g}" if stage.held_out else ""
        section.items.append(
            Picture(
                figure=stage_panels([stage]),
                caption=f"Stage {stage.name}: loss by step"
                + (", with its weighted parts" if len(stage.parts) > 1 else "")
                + (" and on held-out text." if stage.held_out else "."),
                alternative=f"Loss of stage {stage.name}: {stage.loss[first]:.4g} at step {first}, "
                f"{stage.loss[last]:.4g} at step {last} of {stage.steps}{held_out}",
            )
        )
    events = [event for event in run.events if event["event"] in ("resumed", "weights-kept")]
    section.items += [Lines(lines=[_event_line(event) for event in events], as_list=True)] if events else []
    return section


def _event_line(event: Json) -> str:
    if event["event"] == "resumed":
        return f"stage {event.get('stage')}: resumed at step {event.get('step')}"
    stopped = ", stopped early" if event.get("stopped_early") else ""
    averaged = ", the moving average of its weights" if event.get("is_averaged") else ""
    return f"stage {event.get('stage')}: ends with the weights of step {event.get('step')}{averaged}{stopped}"


def selection_section(run: RunRecord) -> Section:
    """Return the section of the measured choice of layers; empty if they were not chosen by measurement."""
    found = run.selection
    section = Section(name="layers", title="Choice of layers")
    if not found:
        return section
    layers, compared = found["layers"], found["compared"]
    section.note = (
        f"Chosen by {found['strategy']} ({found['metric']}) on {found['tokens']:,} tokens: each block alone got a new, "
        "untrained mixer."
    )
    names = [str(layer["layer"]) for layer in layers]
    kept = [layer["kl"] if layer["kept"] else None for layer in layers]
    replaced = [None if layer["kept"] else layer["kl"] for layer in layers]
    section.items.append(
        Picture(
            figure=bars(
                names, (("keeps attention", kept), ("replaced", replaced)), title="KL of one new mixer", stacked=True
            ),
            caption="KL divergence from the teacher, nats per token, when this block alone has a new mixer.",
            alternative="KL by block: " + ", ".join(f"{layer['layer']}: {layer['kl']:.3f}" for layer in layers),
        )
    )
    section.items.append(
        Table(
            caption="Choices compared on other text, before training",
            headings=("choice", ">KL", ">difference", ">interval", ">copying"),
            rows=[
                (
                    str(one["name"]),
                    f"{one['kl']:.3f}",
                    number(one["difference"], sign=True),
                    interval(one["low"], one["high"], sign=True),
                    f"{one['copying']:.2f}",
                )
                for one in compared
            ],
        )
    )
    return section


def features_section(run: RunRecord) -> Section:
    """Return the section of layer similarity and of the projectors; empty where neither was recorded."""
    section = Section(name="features", title="Features")
    section.items += _mixing_pictures(run)
    for name, matrix in (run.plan.get("similarities") or {}).items():
        try:
            figure = similarity(matrix, name=f"CKA for {name}")
        except (UsageError, ValueError):
            continue
        best = [max(range(len(row)), key=row.__getitem__) for row in matrix]
        section.items.append(
            Picture(
                figure=figure,
                caption=f"Similarity of layers (debiased CKA) for {name} before training; the dot is the highest.",
                alternative=f"Similarity for {name}, {len(matrix)} student, {len(matrix[0])} teacher layers; nearest: "
                + ", ".join(f"{own} to {other}" for own, other in enumerate(best)),
            )
        )
    projectors = run.projectors.get("projectors") or ()
    rows = [_projector_row(entry) for entry in projectors]
    if rows:
        headings = ("stage", "projector", "kind", ">rank", ">condition", ">explained", ">alone")
        section.items.append(
            Table(
                caption="Projectors: share of the teacher's variance that the student explains, and that a projector "
                "explained alone before training",
                headings=headings,
                rows=rows,
            )
        )
    return section


def _mixing_pictures(run: RunRecord) -> Iterator[Picture]:
    """Yield a picture per layer of the student: matrices of the teacher at the left, of the student at the right."""
    names = sorted(run.mixing)
    for start in range(0, len(names), 2 * HEADS):
        panels, titles = [], []
        for name in names[start : start + 2 * HEADS]:
            _, side, layer, head = name.split(".")
            titles.append(f"{side}, layer {layer}, head {head}")
            panels.append((f"{side} {layer}.{head}", run.mixing[name].double().numpy()))
        yield Picture(
            figure=mixing_panels(panels, columns=2),
            caption="Token-mixing matrices after training, on training text: what each token (down) reads from "
            "earlier ones, as shares of its row. Titles: layer.head.",
            alternative=f"Token-mixing matrices: {'; '.join(titles)}",
        )


def _projector_row(entry: Json) -> tuple[str, ...]:
    found = entry["diagnosis"]
    return (
        str(entry["stage"]),
        str(entry["projector"]),
        str(found["kind"]),
        f"{found['rank']}/{found['possible_rank']}",
        number(found["condition"]),
        f"{found['explained']:.0%}",
        "-" if found["alone"] is None else f"{found['alone']:.0%}",
    )


def cost_section(run: RunRecord) -> Section:
    """Return the section of tokens, FLOPs, time and memory that the run took."""
    section = Section(name="cost", title="Cost", note="FLOPs are the plan's estimate for the steps that were taken.")
    rows = [
        (
            cost.name,
            f"{cost.step:,}" + (f"/{cost.steps:,}" if cost.steps is not None else ""),
            f"{cost.tokens:,}",
            count_text(cost.flops),
            "-" if cost.seconds is None else duration(cost.seconds),
            "-" if cost.peak_bytes is None else byte_text(cost.peak_bytes),
        )
        for cost in run.costs
    ]
    if len(rows) > 1:
        total = (f"{run.tokens:,}", count_text(run.flops))
        seconds = "-" if run.seconds is None else duration(run.seconds)
        peak = "-" if run.peak_bytes is None else byte_text(run.peak_bytes)
        rows.append(("all stages", "", *total, seconds, peak))
    headings = ("stage", ">steps", ">tokens", ">FLOPs", ">time", ">peak memory")
    section.items.append(Table(caption="Cost of training", headings=headings, rows=rows))
    seen = [event for event in run.events if event["event"] == "finished"]
    if seen and isinstance(seen[-1].get("seconds"), int | float):
        section.items.append(Lines(lines=[f"From start to end of the last call: {duration(seen[-1]['seconds'])}."]))
    return section


def provenance_section(run: RunRecord) -> Section:
    """Return the section of signatures, environment and the mapping file."""
    section = Section(name="provenance", title="Signatures and environment")
    identity = [("mapping file", str(run.plan.get("fingerprint", "-")))]
    made_from = run.plan.get("made_from") or {}
    identity += [(key.replace("_", " "), value) for key, value in _flat(made_from)]
    evaluation = run.evaluation
    identity += [
        (f"evaluation, {key}", str(evaluation[key])) for key in ("level", "resamples", "seed") if key in evaluation
    ]
    identity += [
        (f"text {entry['text']}", f"{entry['fingerprint']}, {entry['rows']} rows")
        for entry in evaluation.get("results", {}).get("likelihood") or ()
        if isinstance(entry, dict) and {"text", "fingerprint", "rows"} <= entry.keys()
    ]
    section.items.append(Table(caption="Made from", headings=("input", "signature"), rows=identity))
    environment = [(key.replace("_", " "), _value(value)) for key, value in run.environment.items()]
    if environment:
        section.items.append(Table(caption="Environment", headings=("", "value"), rows=environment))
    if run.mapping:
        section.items.append(Folded(caption="Mapping file", text=run.mapping))
    command = shlex.join(["xarch-kd", "evaluate", str(run.folder.root)])
    section.items.append(Lines(lines=[f"Measure again: {command}"]))
    return section


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}…"
