"""The table of strategies as Markdown, from its stored results alone."""

from __future__ import annotations

from typing import Any

from benchmarks.recipe_arms import groups
from benchmarks.recipe_statistics import Interval, mean_interval, paired


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Strategies on a real teacher", ""]
    gaps = {
        arm["name"]: {row["seed"]: row["gap"] for row in result["runs"] if row["arm"] == arm["name"]}
        for arm in result["arms"]
    }
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    for group, heading in groups().items():
        lines += [
            f"## {heading}",
            "",
            "| arm | tokens | seconds | seeds | gap | differences |",
            "|---|---|---|---|---|---|",
        ]
        for arm in result["arms"]:
            own = gaps[arm["name"]]
            if arm["group"] != group or not own:
                continue
            against = [(titles[name], paired(own, gaps[name])) for name in arm["references"]]
            differences = "; ".join(f"{shown(found)} to {title}" for title, found in against if found)
            lines.append(
                f"| {arm['title']} | {arm['tokens']:,} | {arm['seconds']:.0f} | {len(own)} "
                f"| {shown(mean_interval(list(own.values())))} | {differences or '-'} |"
            )
        lines.append("")
    return "\n".join(lines)


def shown(interval: Interval) -> str:
    """Return a mean with half the width of its interval."""
    return f"{interval.mean:+.3f}" + ("" if interval.half is None else f" ± {interval.half:.3f}")
