"""Sweep: one run for every combination of settings and seeds, in one folder, compared at the end."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from xarch_kd.errors import UsageError, suggest
from xarch_kd.job.train import train
from xarch_kd.mapping_file.load import load_mapping
from xarch_kd.mapping_file.yaml_core import read_yaml
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.report.compare import Comparison, compare
from xarch_kd.report.compared_page import render_comparison, write_comparison
from xarch_kd.run.report import Reporter

# Of a file name, for every file system.
LONGEST_NAME: Final = 100


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run of a sweep: the name of its folder, the changed settings by key, and its plan."""

    name: str
    changes: Mapping[str, Any]
    plan: Plan


def sweep(
    mapping: str | Path,
    output_dir: str | Path,
    *,
    settings: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Train a mapping file once for every combination of `settings` and seed, and return the comparison of the runs.

    `settings` are values by key, e.g. `{"stages.0.optimizer.lr": [1e-3, 3e-3]}`; list items are numbers. `seeds` counts
    from the file's own seed. All plans are checked before the first run. Finished runs of the folder are kept and
    unfinished ones resume, so that the call can be repeated. `comparison.html` is written into the folder.

    Raises UsageError for keys that do not exist, values given twice, and a file without evaluation, MappingFileError
    for combinations that are refused, and whatever training raises.
    """
    reporter = Reporter(console)
    runs = swept_runs(mapping, settings or {}, seeds)
    root = Path(output_dir)
    for number, run in enumerate(runs, 1):
        reporter.line(f"run {number} of {len(runs)}: {run.name}")
        train(run.plan, root / run.name, resume=True, console=console)
    folders = [root / run.name for run in runs]
    comparison = compare(folders)
    reporter.show(render_comparison(comparison))
    reporter.line(f"comparison: {write_comparison(folders, root / 'comparison.html')}")
    return comparison


def swept_runs(mapping: str | Path, settings: Mapping[str, Sequence[Any]], seeds: int = 1) -> list[SweptRun]:
    """Return the runs of a sweep with their plans, which are all checked; errors as `sweep`."""
    loaded, text, _ = load_mapping(mapping)
    content = _plain(read_yaml(text, str(mapping))[0])
    if seeds < 1:
        raise UsageError("A sweep has at least one seed.", asked=f"seeds {seeds}")
    if loaded.evaluate is None:
        raise UsageError(
            "A sweep compares its runs, and this mapping file does not evaluate them.",
            asked=mapping,
            fix="add evaluate: {} to the file",
        )
    if seeds > 1 and "seed" in settings:
        raise UsageError("The seed is given twice.", asked="seed", fix="give seeds, or the setting seed")
    axes = {key: list(values) for key, values in settings.items()}
    if seeds > 1:
        axes["seed"] = [loaded.seed + offset for offset in range(seeds)]
    for key, values in axes.items():
        if not values or len({repr(value) for value in values}) < len(values):
            raise UsageError("A setting of a sweep needs different values.", asked=f"{key}: {values}")
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(combinations) < 2:
        raise UsageError("A sweep of one run compares nothing.", fix="give --set KEY=VALUE,VALUE or --seeds 3")
    names = [_name(combination) for combination in combinations]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError("Two runs of the sweep would have one folder.", found=", ".join(repeated))
    return list(_planned(content, combinations, names))


def _planned(content: Any, combinations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[SweptRun]:
    rates = None
    for name, changes in zip(names, combinations, strict=True):
        changed = copy.deepcopy(content)
        for key, value in changes.items():
            _set(changed, key, value)
        plan = make_plan(changed, rates=rates)
        rates = plan.rates
        yield SweptRun(name=name, changes=changes, plan=plan)


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """Return key and values of `KEY=VALUE,VALUE`; commas inside brackets and braces belong to a value.

    Values are read as in a mapping file. Raises UsageError, MappingFileError where they are no YAML.
    """
    key, equals, rest = text.partition("=")
    content, _, problems = read_yaml(f"values: [{rest}]", "--set")
    values = _plain(content.get("values")) if isinstance(content, dict) else None
    if not key.strip() or not equals or problems or not isinstance(values, list) or not values:
        raise UsageError(
            "A setting of a sweep is a key and its values.",
            asked=f"--set {text}",
            fix="--set stages.0.optimizer.lr=1e-3,3e-3",
        )
    return key.strip(), values


def _plain(value: Any) -> Any:
    """Return YAML values with lists in place of tuples, which can be changed."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _set(content: Any, key: str, value: Any) -> None:
    """Set a value in nested data by its key, e.g. `stages.0.steps`. Raises UsageError for a place that does not exist.

    The last part may be new in a mapping: whether it is a key of the file is checked with the plan.
    """
    *parents, last = key.split(".")
    place = content
    for part in parents:
        place = place[_index(place, part, key)]
    if isinstance(place, dict):
        place[last] = value
    else:
        place[_index(place, last, key)] = value


def _index(place: Any, part: str, key: str) -> Any:
    if isinstance(place, dict) and part in place:
        return part
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return int(part)
    allowed = list(place) if isinstance(place, dict) else [str(index) for index in range(len(place or ()))]
    raise UsageError(
        f"The mapping file has no '{part}' there.{suggest(part, allowed)}",
        asked=key,
        allowed=", ".join(allowed) or "nothing",
    )


def _name(changes: Mapping[str, Any]) -> str:
    """Return the folder's name of a combination: the last part of each key, and whole keys where these are equal."""
    lasts = [key.rsplit(".", 1)[-1] for key in changes]
    shown = [
        f"{last if lasts.count(last) == 1 else key}={value}"
        for last, (key, value) in zip(lasts, changes.items(), strict=True)
    ]
    return re.sub(r"[^\w.=,+-]+", "-", ",".join(shown))[:LONGEST_NAME].strip("-.")
