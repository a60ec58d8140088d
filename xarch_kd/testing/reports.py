"""Run folders as runs leave them, written without training, for tests of reports and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a hostile model writes: markup, a word that is longer than a page, text that reads backwards, a NUL.
HOSTILE = (
    "<script>document.title = 'broken'</script><img src=x onerror=alert(1)>",
    "w" * 10_000,
    "שלום \u202e reversed",
    "before\x00after\x1b[31m",
)
WriteRun = Callable[..., Path]


def likelihood(difference: float = 0.25, *, text: str = "held-out", fingerprint: str = "f" * 16) -> dict[str, Any]:
    """Return the stored likelihood on one text."""
    return {
        "text": text,
        "description": "held-out part of the training text",
        "rows": 4,
        "tokens": 60,
        "fingerprint": fingerprint,
        "teacher_nll": 2.0,
        "student_nll": 2.0 + difference,
        "difference": difference,
        "low": difference - 0.125,
        "high": difference + 0.125,
        "p_value": 0.5,
        "by_position": [
            {"start": 1, "stop": 2, "teacher_nll": 3.0, "student_nll": 3.0},
            {"start": 2, "stop": 8, "teacher_nll": 2.0, "student_nll": 2.75},
        ],
        "row_tokens": [15, 15, 15, 15],
        "row_nll": [15 * (2.0 + difference) + offset for offset in (-0.5, 0.5, 0.25, -0.25)],
        "details": None,
        "teacher_perplexity": 7.39,
        "student_perplexity": 9.49,
    }


def suite(**changes: Any) -> dict[str, Any]:
    """Return the stored result of a suite with a figure, a curve with a band, and hostile samples."""
    figure = {
        "name": "distinct-2",
        "unit": "",
        "better": "teacher",
        "teacher": 0.8,
        "student": 0.4,
        "value": 0.5,
        "compared": "ratio",
        "low": 0.4,
        "high": 0.6,
        "p_value": 0.001,
        "ceiling": 1.0,
        "count": 32,
        "of": "prompts",
    }
    curve = {
        "name": "excess error",
        "x": "tokens",
        "unit": "%",
        "at": [1.0, 4.0, 16.0],
        "lines": {"student": [0.0, None, 5.0]},
        "bands": {"student": [[-1.0, 1.0], [None, None], [2.0, 8.0]]},
    }
    samples = [{"prompt": text, "teacher": text, "student": text} for text in HOSTILE]
    made = {"signature": "diversity.v1", "figures": [figure], "curves": [curve], "samples": samples, "notices": []}
    return made | changes
