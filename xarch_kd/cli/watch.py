"""`xarch-kd watch`: draw the loss curves of a running or finished run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from xarch_kd.cli.console import make_console
from xarch_kd.errors import UsageError
from xarch_kd.run.curves import CurveReader, StageCurves
from xarch_kd.run.folder import RunFolder
from xarch_kd.run.plot import curve_plot, sparkline
from xarch_kd.run.report import clock

PLOT_HEIGHT = 12
SPARK_WIDTH = 30
# Without a new event for this long, a run that is not finished is reported as silent.
SILENT_SECONDS = 60.0


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, as given to `xarch-kd train --output`.")],
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Stage to draw; by default the last one.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two frames.")] = 2.0,
) -> None:
    """Draw the loss curves of a run, training or finished: total, parts, and on held-out text.

    The picture is renewed until the run is finished, or until Ctrl-C, which leaves the run alone. Without a terminal
    one frame is printed.
    """
    folder = RunFolder(run)
    check_folder(folder)
    console = make_console()
    reader = CurveReader(folder.events)
    reader.update()
    if stage is not None and reader.stages and stage not in reader.stages:
        raise UsageError("the run has no such stage", asked=stage, allowed=", ".join(reader.stages))
    if once or not console.is_terminal or folder.manifest.is_file():
        console.print(frame(folder, reader, stage, console))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(frame(folder, reader, stage, console), refresh=True)
                if folder.manifest.is_file():
                    return
                time.sleep(every)
                reader.update()
    except KeyboardInterrupt:
        return


def check_folder(folder: RunFolder) -> None:
    """Raise UsageError unless a run was, or is being, started in the folder."""
    if not folder.root.is_dir():
        raise UsageError(f"There is no run folder {folder.root}.", fix="give the folder that --output named")
    if not any((folder.root / name).exists() for name in ("plan.json", "events.jsonl", "run.lock")):
        raise UsageError(
            f"{folder.root} is not a run folder: it has neither plan.json nor events.jsonl.",
            fix="give the folder that --output named",
        )


def frame(folder: RunFolder, reader: CurveReader, stage: str | None, console: Console) -> RenderableType:
    """Return one picture: a line per stage, and the curves of one of them."""
    ascii_only = not console.encoding.lower().startswith("utf")
    title = Text(f"{folder.root}: {_state(folder, reader)}", style="bold")
    if not reader.stages:
        return Group(title, Text("no step was taken yet"))
    shown = reader.stages.get(stage) if stage is not None else list(reader.stages.values())[-1]
    lines: list[RenderableType] = [title]
    if len(reader.stages) > 1:
        lines.append(_overview(reader, ascii_only))
    if shown is not None and shown.loss:
        lines += _curves(shown, console.width, ascii_only)
    if reader.skipped:
        lines.append(Text(f"{reader.skipped} lines of {folder.events.name} are damaged and left out", style="dim"))
    return Group(*lines)


def _state(folder: RunFolder, reader: CurveReader) -> str:
    if folder.manifest.is_file():
        return "finished"
    silent = 0.0 if reader.last_time is None else time.time() - reader.last_time
    return f"no news for {clock(silent)}" if silent > SILENT_SECONDS else "running"


def _overview(reader: CurveReader, ascii_only: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "step", "loss", ""):
        table.add_column(column)
    for stage in reader.stages.values():
        spark = Text(sparkline(stage.loss, width=SPARK_WIDTH, ascii_only=ascii_only), style="cyan")
        table.add_row(Text(stage.name), f"{stage.step}/{stage.steps}", _change(stage.loss), spark)
    return table


def _curves(stage: StageCurves, width: int, ascii_only: bool) -> list[RenderableType]:
    figures = [f"step {stage.step}/{stage.steps}", f"loss {stage.loss[stage.step]:.4f}"]
    if stage.nll:
        last = max(stage.nll)
        figures.append(f"held-out loss {stage.held_out.get(last, float('nan')):.4f}, NLL {stage.nll[last]:.4f}")
    if stage.learning_rate is not None:
        figures.append(f"learning rate {stage.learning_rate:.3g}")
    if stage.tokens_per_second is not None:
        figures.append(f"{stage.tokens_per_second:,.0f} tokens/s")
    if stage.eta_seconds is not None and not stage.is_finished:
        figures.append(f"ETA {clock(stage.eta_seconds)}")
    found: list[RenderableType] = [
        Text(f"{stage.name}  " + "  ".join(figures)),
        curve_plot(
            stage.loss,
            stage.held_out,
            last=max(stage.steps, stage.step),
            width=width,
            height=PLOT_HEIGHT,
            ascii_only=ascii_only,
        ),
        Text("line: loss" + ("   o: held-out loss" if stage.held_out else ""), style="dim"),
    ]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("part", "first to last", ""):
        table.add_column(column)
    curves = {**stage.parts, "held-out loss": stage.held_out, "held-out NLL": stage.nll}
    for name, curve in curves.items():
        if curve:
            spark = Text(sparkline(curve, width=SPARK_WIDTH, ascii_only=ascii_only), style="cyan")
            table.add_row(Text(name), _change(curve), spark)
    return [*found, table]


def _change(curve: dict[int, float]) -> str:
    return f"{curve[min(curve)]:.4g} to {curve[max(curve)]:.4g}" if curve else ""
