"""`xarch-kd data`: show what is in a mapping file's text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from xarch_kd.job.data_report import DataReport, Piece, SourceReport

# Around tokens that are to be predicted, and before a document that is read on its own, where there is no color.
OPEN, CLOSE, BORDER = "⟦", "⟧", "┃"
BAR = 40


def command(
    mapping: Annotated[Path, typer.Argument(help="Mapping file, YAML.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows of each source to print.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Show what is in a mapping file's text: documents, tokens, lengths, labels, repeats, and the first packed rows.

    The text is tokenized by the teacher's tokenizer, split and packed as for training; no weights are read. Where only
    some tokens are to be predicted, they are colored in a terminal and in ⟦…⟧ elsewhere; ┃ begins an isolated document.
    """
    from xarch_kd.cli.console import make_console, quiet_libraries

    quiet_libraries()
    from xarch_kd.job.data_report import report_data
    from xarch_kd.planning.resolve import make_plan
    from xarch_kd.run.report import Reporter

    report = report_data(make_plan(mapping), Reporter(make_console(stderr=True)), rows=rows)
    if as_json:
        import dataclasses

        print(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False))
        return
    console = make_console()
    for source in report.sources:
        print_source(source, report, console)


def print_source(source: SourceReport, report: DataReport, console: Console) -> None:
    """Print the figures of a source, its lengths, and its first rows."""
    share = f" ({source.weight:.0%} of the rows drawn)" if len(report.sources) > 1 else ""
    console.print(f"{source.description}{share}", style="bold", markup=False, highlight=False, soft_wrap=True)
    for line in figures(source, report):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(lengths_table(source), highlight=False)
    is_masked = source.counted is not None
    for number, row in enumerate(source.first_rows):
        console.print(f"row {number}", style="dim", highlight=False)
        console.print(row_text(row, in_color=console.is_terminal and not console.no_color, is_masked=is_masked))
    console.print()


def figures(source: SourceReport, report: DataReport) -> Iterator[str]:
    """Yield the lines about documents, labels and rows."""
    held = f"; {source.held_out:,} more are held out" if source.held_out else ""
    yield f"{source.tokens:,} tokens in {source.documents:,} documents{held}"
    if source.counted is not None:
        none = f"; {source.uncounted_documents:,} documents have none" if source.uncounted_documents else ""
        yield f"{source.counted / source.tokens:.1%} of the tokens are to be predicted ({source.counted:,}){none}"
    if source.repeated:
        yield f"{source.repeated:,} documents repeat the content of another ({source.repeated / source.documents:.1%})"
    if source.longer:
        rest = f", and the rest of {source.cut:,} is left out" if source.cut else ""
        yield f"{source.longer:,} documents are longer than a row of {report.sequence_length:,} tokens{rest}"
    how = f"{report.packing}, {'isolated' if report.isolated else 'joined'} documents"
    yield f"{source.rows:,} rows ({how}): {source.row_tokens:,} tokens, {source.waste:.1%} padding"


def lengths_table(source: SourceReport) -> Table:
    """Return the histogram of the documents' lengths."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("  tokens per document", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("")
    most = max(each.documents for each in source.lengths)
    for each in source.lengths:
        size = f"{each.low:,}" if each.low == each.high else f"{each.low:,}-{each.high:,}"
        table.add_row(size, f"{each.documents:,}", f"{each.tokens:,}", "█" * -(-BAR * each.documents // most))
    return table


def row_text(row: tuple[Piece, ...], *, in_color: bool, is_masked: bool) -> Text:
    """Return a row's text with what is to be predicted made visible; nothing is marked where that is everything."""
    from rich.text import Text

    text = Text()
    for place, piece in enumerate(row):
        if piece.starts_document and place > 0:
            text.append(BORDER, style="bold red" if in_color else "")
        if not is_masked or not piece.counted:
            text.append(piece.text, style="dim" if is_masked and in_color else "")
        elif in_color:
            text.append(piece.text, style="green")
        else:
            text.append(f"{OPEN}{piece.text}{CLOSE}")
    return text
