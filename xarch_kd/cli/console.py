"""Console that commands print on."""

from __future__ import annotations

import os

from rich.console import Console

# Without a terminal, rich would cut tables to 80 columns and break their words.
PLAIN_WIDTH = 110


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, or of `PLAIN_WIDTH` columns without one."""
    console = Console(quiet=quiet, stderr=stderr)
    return console if console.is_terminal else Console(quiet=quiet, stderr=stderr, width=PLAIN_WIDTH)


def quiet_libraries() -> None:
    """Hide the progress bars and advice of transformers, in favor of our own progress lines.

    Call it before anything else imports transformers: its GGUF reader's bar is tqdm's own, which reads its environment
    on import.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
