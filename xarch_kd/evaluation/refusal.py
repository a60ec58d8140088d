"""Refusal of a suite, which leaves the other suites of an evaluation as they are."""

from __future__ import annotations

from xarch_kd.errors import XarchError


class NotMeasured(XarchError):
    """A suite of an evaluation that these models or texts cannot serve."""

    exit_code = 2
