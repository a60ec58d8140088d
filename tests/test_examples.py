"""Every public function and class has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import xarch_kd as xkd

MODULES = ("layer_mapping", "losses", "ops", "plots", "projectors")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def public() -> Iterator[tuple[str, Any]]:
    """Yield public functions and classes by name; aliases of types and tables have no docstring of their own."""
    for name in MODULES:
        module = getattr(xkd, name)
        yield from ((f"{name}.{inner}", getattr(module, inner)) for inner in module.__all__)
    yield from ((name, getattr(xkd, name)) for name in xkd.__all__)


EXAMPLES = [(name, value) for name, value in public() if inspect.isfunction(value) or inspect.isclass(value)]


@pytest.mark.parametrize(("name", "value"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_example_runs(name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", {}, name, None, None)
    assert example.examples, f"xarch_kd.{name} has no example"
    failures: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=failures.append)
    assert result.failed == 0, "".join(failures)
