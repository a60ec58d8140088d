"""Markdown tables and plots of stored results, from their JSON alone.

python -m benchmarks.tables [FILE …]     by default every result of `benchmarks.run` in benchmarks/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import ROOT

RESULTS: Final = ROOT / "benchmarks" / "results"
HEADER: Final = (
    "| contender | seconds | ÷ baseline | MB over inputs | ÷ baseline | share of roofline | error of value | "
    "worst error of a gradient |"
)


def main(arguments: list[str] | None = None) -> None:
    """Write the tables and plots of the given files."""
    given = [Path(one) for one in (sys.argv[1:] if arguments is None else arguments)]
    for path in given or stored():
        render(path)


def stored() -> list[Path]:
    """Return the stored results that have cases (other files of the folder are written by other programs)."""
    return [path for path in sorted(RESULTS.glob("*-*.json")) if "cases" in json.loads(path.read_text("utf-8"))]


def render(path: Path) -> None:
    """Write the table of a result beside it and, with matplotlib, its plots."""
    result = json.loads(path.read_text(encoding="utf-8"))
    try:
        from benchmarks.plots import draw

        plots = draw(result, path)
    except ImportError as error:
        # The table is complete without plots.
        print(f"No plots: matplotlib does not load: {error}")
        plots = []
    path.with_suffix(".md").write_text(document(result, plots), encoding="utf-8")


def document(result: dict[str, Any], plots: list[str]) -> str:
    """Return a result as Markdown."""
    parts = [f"# {result['operation']} on {result['settings']['device']}", heading(result)]
    if result["settings"]["quick"]:
        parts.append("**A smoke run: the figures mean nothing.**")
    parts += [f"![{name}]({name})" for name in plots]
    parts += [case_table(case) for case in result["cases"]]
    if result["growths"]:
        parts.append(growth_table(result["growths"]))
    return "\n\n".join(parts) + "\n"


def heading(result: dict[str, Any]) -> str:
    """Return the paragraph on command, time, revision, machine and versions."""
    stamp, settings = result["stamp"], result["settings"]
    revision = stamp["revision"]
    clean = {True: "", False: " with changes", None: ""}[revision["clean"]]
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    against = f" against {stamp['against'][:12]}" if "against" in stamp else ""
    return (
        f"Made by `python -m benchmarks.run --op {result['operation']}` at {stamp['time']}, revision "
        f"{(revision['commit'] or 'unknown')[:12]}{clean}{against}; {stamp['device']}, {stamp['threads']} of "
        f"{stamp['processors']} processors' threads, {stamp['system']}, Python {stamp['python']}, {versions}; "
        f"{settings['repeats']} rounds. Forward and, where there are gradients, backward. Seconds: median "
        "(least to greatest); ratios are of the same round."
    )


def case_table(case: dict[str, Any]) -> str:
    """Return one case as a Markdown section."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in case["sizes"].items())
    roof, gradients = case["roofline"], ", ".join(case["gradients"]) or "nothing"
    what = case.get("whole") or f"gradients of {gradients}"
    # The traffic of a whole step is not that of the case's inputs.
    traffic = "" if case.get("whole") else f", {case['bytes'] / 1e6:.4g} MB at least"
    lines = [
        f"## {case['case']}",
        "",
        f"{sizes}; {case['dtype']}; {what}; baseline {case['baseline']}. "
        f"Task: {case['flops'] / 1e9:.4g} GFLOP{traffic}; roofline "
        f"{roof['floor_seconds']:.3g} s at {roof['flops'] / 1e9:.4g} GFLOP/s and {roof['bandwidth'] / 1e9:.3g} GB/s "
        f"({roof['source']}).{proxy(case)}",
        "",
        HEADER,
        "|---|---|---|---|---|---|---|---|",
        *(row(name, one) for name, one in case["contenders"].items() if "seconds" in one),
    ]
    missing = [f"- {name}: {one['missing']}" for name, one in case["contenders"].items() if "seconds" not in one]
    if missing:
        lines += ["", "Not measured:", "", *missing]
    if case["bounds"]:
        lines += ["", "| bound | allowed | measured | met |", "|---|---|---|---|"]
        lines += [bound_row(bound) for bound in case["bounds"]]
    return "\n".join(lines)


def proxy(case: dict[str, Any]) -> str:
    """Return the sentence on the other sizes at which errors were measured, or an empty string."""
    errors = next((one["errors"] for one in case["contenders"].values() if one.get("errors")), None)
    changed = {name: size for name, size in (errors or case)["sizes"].items() if size != case["sizes"].get(name)}
    if not changed:
        return ""
    return " Errors were taken at " + ", ".join(f"{name} {size:,}" for name, size in changed.items()) + "."


def row(name: str, one: dict[str, Any]) -> str:
    """Return a contender as a row."""
    seconds, ratios, errors = one["seconds"], one["ratios"], one["errors"]
    time = (
        f"{ratios['time']['median']:.2f} ({ratios['time']['low']:.2f}-{ratios['time']['high']:.2f})" if ratios else ""
    )
    gradient = max(errors["gradients"].values(), default=None) if errors else None
    before = one.get("ratios_to_before")
    cells = [
        name,
        f"{seconds['median']:.3g} ({seconds['low']:.3g}-{seconds['high']:.3g})",
        time,
        f"{one['memory']['peak_bytes'] / 1e6:.4g}",
        f"{ratios['memory']:.3f}" if ratios else "",
        f"{one['roofline_share']:.1%}",
        f"{errors['value']:.1e}" if errors else "",
        "" if gradient is None else f"{gradient:.1e}",
    ]
    if before:
        cells[0] += f" (÷ before: time {before['time']['median']:.2f}, memory {before['memory']:.2f})"
    return f"| {' | '.join(cells)} |"


def bound_row(bound: dict[str, Any]) -> str:
    """Return a bound as a row."""
    name = f"{bound['contender']}: {bound['measure']}"
    if bound["against"] is not None:
        name += f" ÷ {bound['against']}"
    else:
        name += " share"
    return f"| {name} | {allowed(bound)} | {outcome(bound)} |"


def allowed(bound: dict[str, Any]) -> str:
    """Return the allowed value of a bound."""
    return f"≤ {bound['at_most']:g}" if bound.get("at_most") is not None else f"≥ {bound['at_least']:g}"


def outcome(bound: dict[str, Any]) -> str:
    """Return the measured value and the verdict of a bound, as two cells."""
    measured = f"{bound['measured']:.3f}" if bound["measured"] is not None else bound["why"]
    return f"{measured} | {'not measured' if bound['met'] is None else 'yes' if bound['met'] else 'no'}"


def growth_table(growths: list[dict[str, Any]]) -> str:
    """Return the growth bounds as a Markdown section."""
    lines = ["## Growth", "", "Slope of log(measure) over the sizes of a group: 1 is linear, 2 quadratic.", ""]
    lines += ["| group, contender: measure | allowed | measured | met |", "|---|---|---|---|"]
    lines += [
        f"| {one['group']}, {one['contender']}: {one['measure']} | {allowed(one)} | {outcome(one)} |" for one in growths
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
