"""`xarch-kd inspect`: list the taps of a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from xarch_kd.cli.console import make_console
from xarch_kd.errors import UsageError, suggest
from xarch_kd.mapping_file.schema import Paths
from xarch_kd.models.loading.load import check_files, load_config, meta_model
from xarch_kd.taps.inspect import TapRow, inspect_model


def command(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or package:NAME/FILE.gguf.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Attribute path of a part of an unknown model, e.g. blocks=model.layers; may be given several times.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """List the taps of a model with shapes and modules, from its config; the names of its weights are checked."""
    config = load_config(model, revision)
    built = meta_model(config)
    check_files(built, model)
    rows = inspect_model(built, parse_paths(path or []))
    if as_json:
        print(
            json.dumps(
                {"model": model, "model_type": config.model_type, "taps": [dataclasses.asdict(row) for row in rows]}
            )
        )
        return
    console = make_console()
    console.print(f"{model} ({config.model_type})")
    console.print(render(rows))


def parse_paths(given: list[str]) -> Paths | None:
    """Return `name=attribute.path` entries as the mapping file's `paths`, or None if there are none."""
    if not given:
        return None
    pairs: dict[str, str] = {}
    for entry in given:
        name, _, value = entry.partition("=")
        pairs[name] = value
    known = list(Paths.model_fields)
    for name, value in pairs.items():
        if name not in known or not value:
            raise UsageError(
                f"--path takes name=attribute.path.{suggest(name, known) if name not in known else ''}",
                asked=f"{name}={value}" if value else name,
                allowed=", ".join(known),
            )
    missing = [name for name, field in Paths.model_fields.items() if field.is_required() and name not in pairs]
    if missing:
        raise UsageError(
            "--path needs at least blocks and mixer.", found=", ".join(pairs), fix=f"add {', '.join(missing)}"
        )
    return Paths(**pairs)


def render(rows: tuple[TapRow, ...]) -> Table:
    """Return the rows as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("tap", "layers", "shape", "module", "side", "mixer"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        shape = ", ".join(str(size) for size in row.shape)
        table.add_row(row.tap, short_ranges(row.layers), f"({shape})", row.module, row.reads, row.kind or "")
    return table


def short_ranges(layers: tuple[int, ...]) -> str:
    """Return layer indices as ranges: `0-5, 7, 9-11`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
