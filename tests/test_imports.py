"""Import costs: the package and the command line load nothing heavy, and no module loads an optional part."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import xarch_kd

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "numpy", "scipy", "accelerate", "pydantic", "safetensors"}
OPTIONAL = {
    "causal_conv1d",
    "datasets",
    "pyarrow",
    "zstandard",
    "gguf",
    "liger_kernel",
    "lm_eval",
    "mamba_ssm",
    "matplotlib",
    "rouge_score",
    "sacrebleu",
    "tensorboard",
    "triton",
    "trl",
    "wandb",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import xarch_kd; dir(xarch_kd); xarch_kd.XarchError; xarch_kd.__version__",
        "import xarch_kd.kernels",
        "from xarch_kd.cli.app import build_app; build_app()",
        "from xarch_kd.cli.app import main; assert main(['--help']) == 0",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    loaded = run(f"{code}\nimport sys\nprint('loaded', *{{name.split('.')[0] for name in sys.modules}})")
    assert HEAVY.isdisjoint(loaded.splitlines()[-1].split())


def imported_at_once(tree: ast.Module) -> set[str]:
    """Names of modules that importing the module imports: not those of functions and of type checking."""
    found, waiting = set[str](), list[ast.AST](tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def test_no_module_imports_an_optional_part_or_a_kernel() -> None:
    files = sorted((ROOT / "xarch_kd").rglob("*.py"))
    assert len(files) > 40
    for path in files:
        names = imported_at_once(ast.parse(path.read_text()))
        assert {name.split(".")[0] for name in names} & OPTIONAL == set(), path
        assert {name for name in names if name.startswith("xarch_kd.kernels.")} == set(), path


def test_imports_of_functions_and_of_type_checking_are_not_those_of_a_module() -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import a
else:
    import b.c
try:
    from d import e
except ImportError:
    pass
class F:
    import g
    def method(self):
        import h
"""
    assert imported_at_once(ast.parse(text)) == {"typing", "typing.TYPE_CHECKING", "b.c", "d", "d.e", "g"}


def test_public_names_load() -> None:
    assert {name for name in xarch_kd.__all__ if getattr(xarch_kd, name) is None} == set()
    # Submodules are attributes of the package once they are imported; they are not listed.
    assert dir(xarch_kd) == sorted(xarch_kd.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'xarch_kd' has no attribute 'plam'. Did you mean 'plan'\?"):
        _ = xarch_kd.plam  # type: ignore[attr-defined]


def test_type_checkers_see_what_runs() -> None:
    tree = ast.parse((ROOT / "xarch_kd" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen: dict[str, tuple[str, str | None]] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            whole = node.module == "xarch_kd"
            origin = (f"xarch_kd.{alias.name}", None) if whole else (node.module, alias.name)
            seen[alias.asname or alias.name] = origin
    assert seen == xarch_kd._ORIGINS
    assert set(xarch_kd.__all__) == {*seen, "XarchError", "__version__"}
