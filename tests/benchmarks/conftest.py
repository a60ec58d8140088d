"""Fixtures of the tests of benchmarks."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def collected() -> None:
    """Exempt what exists by now from garbage collection, which each measurement of memory begins with."""
    # Loaded by the first contender that runs a scan.
    import torch._dynamo  # noqa: F401

    gc.collect()
    gc.freeze()
