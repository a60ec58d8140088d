"""Checks of the house style that no linter makes: import contract, docstrings, annotations, wording, paths."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "xarch_kd").rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def unannotated(function: Function) -> list[str]:
    signature = function.args
    named_arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
    every = [*named_arguments, *(argument for argument in (signature.vararg, signature.kwarg) if argument is not None)]
    missing = [
        argument.arg for argument in every if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    return [*missing, *(["return"] if function.returns is None else [])]


def test_the_import_contract_holds() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command is not None, "import-linter comes with the extra dev"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_public_things_have_docstrings_and_types(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "every module has a docstring"
    silent = [node.name for node in public_definitions(tree) if not ast.get_docstring(node)]
    assert silent == [], "public functions and classes have a docstring"
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    untyped = {node.name: unannotated(node) for node in functions if unannotated(node)}
    assert untyped == {}, "every signature is typed"


def test_no_unanchored_notes_and_no_machine_paths() -> None:
    bad = re.compile(r"\b(TODO|FIXME|XXX)\b|/(work|home|root|mnt|opt)/")
    texts = [*MODULES, *(ROOT / "mappings").glob("*.*"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.py")]
    found = [
        f"{named(path)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bad.search(line) and "no TODO" not in line
    ]
    assert found == []
