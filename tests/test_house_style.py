"""Checks of the house style that no linter makes: import contract, docstrings, annotations, wording, paths."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "xarch_kd").rglob("*.py"))
SOURCES = [
    *MODULES,
    *(path for folder in ("kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))),
]
PAGES = sorted(
    path for pattern in ("*.md", "mappings/*.md", "docs/*.md", "kernels/README.md") for path in ROOT.glob(pattern)
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
# A docstring opens with an imperative or a noun phrase.
OPENINGS = re.compile(r"(What|How|Whether|Where|Which|Who|Why)\b")
# Rates are "per token", counts "every N steps".
RATES = re.compile(
    r"\b(every so many|(nats|FLOPs|numbers|rows|tokens|bytes|micro-batches|times|seconds|matrix|scalar|value|line) an? "
    r"(token|step|row|head|channel|layer|block|micro-batch|sequence|pair|dimension|chunk|second))\b"
)
# Software raises, returns, prints and reports.
VERBS = re.compile(r"\b(says|tells|knows|wants|asks|nobody|somebody)\b")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def matching(pattern: re.Pattern[str], texts: dict[Path, str]) -> list[str]:
    """Return the lines of the texts that match, with the file of each."""
    return [
        f"{named(path)}: {line.strip()}"
        for path, text in texts.items()
        for line in text.splitlines()
        if pattern.search(line)
    ]


def public_definitions(module: ast.Module) -> Iterator[Function | ast.ClassDef]:
    for node in module.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def docstrings(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            yield text


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


def test_public_things_have_docstrings_and_types() -> None:
    modules = {named(path): tree(path) for path in MODULES}
    assert [name for name, module in modules.items() if not ast.get_docstring(module)] == []
    silent = [
        f"{name}: {node.name}"
        for name, module in modules.items()
        for node in public_definitions(module)
        if not ast.get_docstring(node)
    ]
    assert silent == [], "public functions and classes have a docstring"
    untyped = {
        f"{name}: {node.name}": unannotated(node)
        for name, module in modules.items()
        for node in ast.walk(module)
        if isinstance(node, Function) and unannotated(node)
    }
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


def test_docstrings_open_with_an_imperative_or_a_noun_phrase() -> None:
    first_lines = [(named(path), text.splitlines()[0]) for path in SOURCES for text in docstrings(tree(path))]
    assert len(first_lines) > len(SOURCES)
    assert [found for found in first_lines if OPENINGS.match(found[1])] == []


def test_rates_are_per_token_and_software_does_not_speak() -> None:
    texts = {path: path.read_text() for path in (*SOURCES, *PAGES)}
    assert matching(RATES, texts) == []
    prose = {path: "\n".join(docstrings(tree(path))) if path.suffix == ".py" else text for path, text in texts.items()}
    assert matching(VERBS, prose) == []


def test_the_import_contract_counts_nothing() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = [contract["name"] for contract in configuration["tool"]["importlinter"]["contracts"]]
    assert names and not any("floor" in name.lower() for name in names)
    assert [named(path) for path in SOURCES if re.search(r"\bFloor \d", path.read_text())] == []
