"""The console that commands print on."""

from __future__ import annotations

import os

from rich.console import Console

# Where there is no terminal, tables would otherwise be cut to 80 columns and break their words.
PLAIN_WIDTH = 110


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, or of `PLAIN_WIDTH` columns where there is none."""
    console = Console(quiet=quiet, stderr=stderr)
    return console if console.is_terminal else Console(quiet=quiet, stderr=stderr, width=PLAIN_WIDTH)


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and advice off the screen, where our lines say what is going on.

    To be called before anything else imports transformers: its GGUF reader's bar is tqdm's own, which reads its
    environment when it is imported.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
