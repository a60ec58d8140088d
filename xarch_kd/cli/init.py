"""`xarch-kd init`: write a mapping file for a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xarch_kd.errors import printable


def command(
    teacher: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or package:NAME/FILE.gguf.")],
    mixer: Annotated[str, typer.Option(help="Mixer that replaces attention: mamba2, gated_delta.")] = "mamba2",
    keep_attention: Annotated[
        str | None,
        typer.Option(
            help='Layers that keep attention: "every N", "first N", "last N", "none", or 0,4,8. Default: half of them, '
            "chosen by measurement."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    output: Annotated[Path | None, typer.Option(help="New file to write. Default: print the mapping file.")] = None,
) -> None:
    """Write a mapping file for a student converted from the teacher, from the teacher's config alone.

    Edit it, then check it with `xarch-kd plan`. Examples for fresh students, smaller Transformers and staged recipes
    are in mappings/.
    """
    from xarch_kd.planning.template import mapping_text, write_mapping

    text = mapping_text(teacher, mixer=mixer, keep_attention=keep_attention, revision=revision)
    if output is None:
        print(text, end="")
        return
    write_mapping(output, text)
    print(printable(f"wrote {output}; next: xarch-kd plan {output}"))
