"""Tables and page of a comparison of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from xarch_kd.display import byte_text, count_text, duration
from xarch_kd.files import write_text
from xarch_kd.plots.measured import Difference, intervals
from xarch_kd.plots.training import losses
from xarch_kd.report.compare import COSTS, Comparison, compare_records
from xarch_kd.report.content import Item, Lines, Picture, Section, Table, interval, number
from xarch_kd.report.page import render_page
from xarch_kd.report.read import RunRecord, read_run
from xarch_kd.report.verdict import Verdict

# Measures of quality in the table of the terminal; --json and --csv have all.
SHOWN: Final = 5


def cell(measure: str, value: float | None) -> str:
    """Return a measure as text."""
    if value is None:
        return "-"
    shown = {"tokens": lambda: f"{value:,.0f}", "flops": lambda: count_text(value)}
    shown |= {"seconds": lambda: duration(value), "peak_bytes": lambda: byte_text(value)}
    if measure.startswith("cache bytes"):
        return byte_text(value)
    return shown[measure]() if measure in shown else f"{value:.4g}"


def render_comparison(comparison: Comparison) -> RenderableType:
    """Return the table of runs and that of paired differences, for a terminal."""
    quality = [name for name in comparison.measures if name not in COSTS]
    shown = [*quality[:SHOWN], *COSTS]
    table = RichTable(title="Runs: quality and cost", title_justify="left")
    for heading in ("run", *shown):
        table.add_column(heading, justify="left" if heading == "run" else "right", overflow="fold")
    for run in comparison.runs:
        table.add_row(Text(run.name), *(cell(name, run.measures.get(name)) for name in shown))
    parts: list[RenderableType] = [table]
    if len(quality) > SHOWN:
        parts.append(Text(f"{len(quality) - SHOWN} more measures: --json or --csv"))
    pairs = RichTable(title="Second minus first on the same rows, nats per token", title_justify="left")
    for heading in ("measure", "first", "second", "difference", "interval", "p (Holm)", ""):
        pairs.add_column(heading, justify="right" if heading in ("difference", "interval", "p (Holm)") else "left")
    for row in _pair_rows(comparison):
        pairs.add_row(*map(Text, row))
    return Group(*parts, pairs)


def _pair_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for pair in comparison.pairs:
        verdict = "real" if pair.is_real else "no interval" if pair.low is None else "may be chance"
        bounds = interval(pair.low, pair.high, sign=True)
        yield pair.measure, pair.first, pair.second, f"{pair.value:+.4f}", bounds, number(pair.adjusted), verdict


def write_comparison(runs: Sequence[str | Path], output: Path) -> Path:
    """Write the page that compares runs and return its path. Raises what `compare` raises."""
    records = [read_run(run) for run in runs]
    comparison = compare_records(records)
    write_text(output, comparison_page(comparison, records))
    return output


def comparison_page(comparison: Comparison, records: Sequence[RunRecord]) -> str:
    """Return the page of a comparison."""
    sections = [_measures_section(comparison), _pairs_section(comparison), _curves_section(comparison, records)]
    signature = [(key, value) for key, value in comparison.signature.items()]
    items: list[Item] = [Table(caption="Equal in all runs", headings=("field", "value"), rows=signature)]
    sections.append(Section(name="signatures", title="Signatures", items=items))
    return render_page(
        title="Comparison",
        subtitle=", ".join(run.name for run in comparison.runs),
        verdict=_verdict(comparison),
        facts=[("runs", str(len(comparison.runs))), ("teacher", comparison.signature["teacher"])],
        problems=[problem for record in records for problem in record.problems],
        sections=[section for section in sections if section.items],
    )


def _verdict(comparison: Comparison) -> Verdict:
    real = [pair for pair in comparison.pairs if pair.is_real]
    total = len(comparison.pairs)
    verdict = Verdict(headline=f"{len(real)} of {total} paired differences are larger than chance explains.")
    for pair in comparison.pairs:
        better, worse = (pair.second, pair.first) if pair.value < 0 else (pair.first, pair.second)
        bounds = interval(pair.low, pair.high, sign=True)
        if pair.is_real:
            verdict.gained.append(
                f"{pair.measure}: {better} is better than {worse} by {abs(pair.value):.4f} nats per token ({bounds})."
            )
        else:
            verdict.undecided.append(
                f"{pair.measure}: {pair.second} against {pair.first} {pair.value:+.4f} ({bounds})."
            )
    verdict.sure.append(
        f"All runs were measured on the same rows; p-values are adjusted by Holm's method over {total} comparisons. "
        "Runs of one seed each do not show the spread between seeds."
    )
    return verdict


def _measures_section(comparison: Comparison) -> Section:
    section = Section(name="runs", title="Runs")
    quality = [name for name in comparison.measures if name not in COSTS]
    for caption, names in (("Quality", quality), ("Cost of training", list(COSTS))):
        rows = [(run.name, *(cell(name, run.measures.get(name)) for name in names)) for run in comparison.runs]
        headings = ("run", *(f">{name.replace('_', ' ')}" for name in names))
        section.items.append(Table(caption=caption, headings=headings, rows=rows))
    return section


def _pairs_section(comparison: Comparison) -> Section:
    section = Section(name="pairs", title="Differences", note="Second minus first, nats per token; lower is better.")
    for measure in dict.fromkeys(pair.measure for pair in comparison.pairs):
        found = [
            Difference(name=f"{pair.second} - {pair.first}", value=pair.value, low=pair.low, high=pair.high)
            for pair in comparison.pairs
            if pair.measure == measure
        ]
        section.items.append(
            Picture(
                figure=intervals(found, title=measure, x_label="nats per token"),
                caption=f"Paired differences in {measure} with their intervals.",
                alternative="; ".join(f"{one.name}: {one.value:+.4f}" for one in found),
            )
        )
    headings = ("measure", "first", "second", ">difference", ">interval", ">p (Holm)", "")
    rows = list(_pair_rows(comparison))
    if rows:
        section.items.append(Table(caption="Paired differences", headings=headings, rows=rows))
    else:
        section.items.append(Lines(lines=["The suite likelihood was not measured: there is nothing to pair."]))
    return section


def _curves_section(comparison: Comparison, records: Sequence[RunRecord]) -> Section:
    """Return the section of loss curves, one picture per stage with a line per run."""
    section = Section(name="training", title="Training")
    names = {run.path: run.name for run in comparison.runs}
    for stage in dict.fromkeys(stage for record in records for stage in record.curves):
        curves = {
            names[str(record.folder.root)]: record.curves[stage].loss
            for record in records
            if stage in record.curves and record.curves[stage].loss
        }
        if curves:
            ends = ", ".join(f"{name} {curve[max(curve)]:.4g}" for name, curve in curves.items())
            section.items.append(
                Picture(
                    figure=losses(stage, curves),
                    caption=f"Stage {stage}: loss by step. Losses of different objectives are not comparable.",
                    alternative=f"Loss of stage {stage} by step; at the end: {ends}",
                )
            )
    return section
