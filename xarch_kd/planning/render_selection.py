"""Tables of a measured choice of layers: scores of each layer, and the choice compared with others."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xarch_kd.planning.layer_choice import ComparedSet, LayerSelection


def render_selection(selection: LayerSelection) -> RenderableType:
    """Return both tables of a selection."""
    has_gates = any(layer.gate is not None for layer in selection.layers)
    scores = _table(
        f"Layers chosen by {selection.strategy} ({selection.metric}), {selection.tokens:,} tokens: nats per token that "
        "one new mixer costs",
        ("layer", "kl", "recall", *(("gate",) if has_gates else ()), "rank", "attention"),
    )
    for layer in selection.layers:
        gate = () if layer.gate is None else (f"{layer.gate:.2f}",)
        kept = "kept" if layer.kept else ""
        scores.add_row(str(layer.layer), f"{layer.kl:.4f}", f"{layer.recall:+.3f}", *gate, str(layer.rank), kept)
    sets = _table(
        "Choices compared on other text, untrained (copying of the teacher: "
        f"{selection.teacher_copying:.2f}; difference: KL minus that of the chosen layers, 95 % interval over rows)",
        ("choice", "kl", "difference", "copying"),
    )
    for one in selection.compared:
        sets.add_row(one.name, f"{one.kl:.3f}", difference_text(one), f"{one.copying:.2f}")
    return Group(scores, Text(""), sets)


def difference_text(one: ComparedSet) -> str:
    """Return the difference of a choice from the chosen one with its interval, empty for the chosen one."""
    if one.difference is None:
        return ""
    interval = "" if one.low is None or one.high is None else f" ({one.low:+.3f} to {one.high:+.3f})"
    return f"{one.difference:+.3f}{interval}"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in ("choice", "attention") else "right")
    return table
