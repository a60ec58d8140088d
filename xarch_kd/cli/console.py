"""Console that commands print on."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

from xarch_kd.display import AsIs
from xarch_kd.errors import printable

# Without a terminal, rich would cut tables to 80 columns and break their words.
PLAIN_WIDTH = 110


class PlainConsole(Console):
    """Console that prints text of mapping files, paths and models as it is: no markup, control characters escaped."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as `rich.console.Console.print` does, but literally."""
        shown = [printable(item) if isinstance(item, str) else AsIs(item) for item in objects]
        super().print(*shown, **{"markup": False, "emoji": False, "highlight": False, **options})


def make_console(*, quiet: bool = False, stderr: bool = False, plain_width: int = PLAIN_WIDTH) -> PlainConsole:
    """Return a console as wide as the terminal, or of `plain_width` columns without one."""
    console = PlainConsole(quiet=quiet, stderr=stderr)
    return console if console.is_terminal else PlainConsole(quiet=quiet, stderr=stderr, width=plain_width)


def quiet_libraries() -> None:
    """Hide the progress bars and advice of transformers, in favor of our own progress lines.

    Call it before anything else imports transformers: its GGUF reader's bar is tqdm's own, which reads its environment
    on import.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
