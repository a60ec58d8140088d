"""Import costs: the package and the command line load nothing heavy, and no module loads an optional part."""

from __future__ import annotations

import ast
import json
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


def test_no_module_imports_an_optional_part() -> None:
    # Import statements are watched, so that the test also holds where the optional parts are not installed.
    code = f"""
import builtins, importlib, json, pkgutil
import xarch_kd
plain, seen = builtins.__import__, []
def watch(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    if importer.startswith("xarch_kd") and name.split(".")[0] in {OPTIONAL!r}:
        seen.append([importer, name])
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = watch
count = 0
for module in pkgutil.walk_packages(xarch_kd.__path__, "xarch_kd."):
    if not module.name.startswith("xarch_kd.kernels."):
        importlib.import_module(module.name)
        count += 1
import sys
print(json.dumps([count, seen, [name for name in sys.modules if name.startswith("xarch_kd.kernels.")]]))
"""
    count, seen, kernels = json.loads(run(code))
    assert count > 40
    assert seen == []
    assert kernels == []


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
