from __future__ import annotations

import pytest

from xarch_kd.testing.mapping import GOOD


@pytest.fixture(scope="session")
def good() -> str:
    """A mapping file with no fault; tests replace one line of it."""
    return GOOD
