"""Log-log plots of seconds and peak memory over the axis of a group of cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

LABELS: dict[str, str] = {"time": "T, tokens of a sequence", "vocabulary": "V, entries", "tokens": "n, tokens"}


def draw(result: dict[str, Any], path: Path) -> list[str]:
    """Write one SVG per group with at least two sizes, beside `path`, and return their names."""
    names = []
    for group in dict.fromkeys(case["group"] for case in result["cases"] if case["axis"] is not None):
        cases = [case for case in result["cases"] if case["group"] == group]
        if len({case["sizes"][case["axis"]] for case in cases}) < 2:
            continue
        name = f"{path.stem}-{re.sub(r'[^a-z0-9]+', '-', group.lower())}.svg"
        _draw_group(group, cases, path.with_name(name))
        names.append(name)
    return names


def _draw_group(group: str, cases: list[dict[str, Any]], path: Path) -> None:
    """Write two panels: seconds and megabytes of each contender."""
    axis = cases[0]["axis"]
    # Text stays text, and no date or random id is written: small files that differ only if the figures do.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9}):
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        names = dict.fromkeys(name for case in cases for name, one in case["contenders"].items() if "seconds" in one)
        for name in names:
            shown = [case for case in cases if "seconds" in case["contenders"].get(name, {})]
            sizes = [case["sizes"][axis] for case in shown]
            ones = [case["contenders"][name] for case in shown]
            panels[0].plot(sizes, [one["seconds"]["median"] for one in ones], marker="o", label=name)
            # A peak of 0 has no logarithm.
            panels[1].plot(sizes, [max(1e-3, one["memory"]["peak_bytes"] / 1e6) for one in ones], marker="o")
        for panel, label in zip(panels, ("seconds, forward and backward", "MB over inputs"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=LABELS.get(axis, axis), ylabel=label)
            panel.set_xticks([case["sizes"][axis] for case in cases], [f"{case['sizes'][axis]}" for case in cases])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        figure.legend(loc="outside right upper")
        figure.suptitle(group)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
