"""The layout of the checkout and of the wheel: `kernels/` and `mappings/` beside the package, and who finds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from xarch_kd._layout import folder

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Run `code` in a fresh interpreter whose first path entry is `cwd`, and return what it printed."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path is not None else {})}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_packages_equal_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.relative_to(ROOT).parts)
        for path in [ROOT / "xarch_kd", *(ROOT / "xarch_kd").rglob("*")]
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert set(settings["packages"]) == folders | {"xarch_kd.kernels", "xarch_kd.mappings"}
    assert settings["package-dir"] == {"xarch_kd.kernels": "kernels", "xarch_kd.mappings": "mappings"}


def test_every_package_folder_has_an_init() -> None:
    missing = [path.parent for path in (ROOT / "xarch_kd").rglob("*.py") if not (path.parent / "__init__.py").is_file()]
    assert missing == []


def test_kernels_is_flat_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_folders_beside_the_package_are_found_in_a_checkout() -> None:
    assert folder("kernels") == ROOT / "kernels"
    assert folder("mappings") == ROOT / "mappings"


def test_import_kernels_from_the_root_is_never_ours(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'someone else'\n")
    assert python("import kernels; print(kernels.OWNER)", cwd=ROOT, path=tmp_path) == "someone else"


def test_transformers_imports_from_the_root_as_from_elsewhere(tmp_path: Path) -> None:
    code = "import transformers, transformers.utils as u; print(transformers.__version__, u.is_kernels_available())"
    assert python(code, cwd=ROOT) == python(code, cwd=tmp_path)


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, with one more kernel, unpacked outside of it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("unpacked")
    for name in ("xarch_kd", "kernels", "mappings"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "kernels" / "example.py").write_text("VALUE = 7\n")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_wheel_carries_everything(unpacked_wheel: Path) -> None:
    (metadata,) = unpacked_wheel.glob("xarch_kd-*.dist-info")
    package = unpacked_wheel / "xarch_kd"
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "xarch-kd = xarch_kd.cli.app:run" in (metadata / "entry_points.txt").read_text()
    assert (package / "py.typed").is_file()
    for name in ("kernels", "mappings"):
        shipped = {path.name for path in (ROOT / name).iterdir() if path.is_file()}
        assert shipped <= {path.name for path in (package / name).iterdir()}
    sources = {path.relative_to(ROOT) for path in (ROOT / "xarch_kd").rglob("*.py")}
    carried = {path.relative_to(unpacked_wheel) for path in package.rglob("*.py")}
    assert sources == {path for path in carried if path.parent != Path("xarch_kd/kernels")}


def test_wheel_runs_outside_the_checkout(unpacked_wheel: Path, tmp_path: Path) -> None:
    code = """
import sys
import xarch_kd
from xarch_kd._layout import folder
from xarch_kd.cli.app import main
import xarch_kd.kernels.example as example
print(xarch_kd.__file__)
print(example.__file__, example.VALUE)
print(folder("mappings"))
sys.exit(main(["--version"]))
"""
    package, kernel, mappings, version = python(code, cwd=tmp_path, path=unpacked_wheel).splitlines()
    inside = unpacked_wheel / "xarch_kd"
    assert package == str(inside / "__init__.py")
    assert kernel == f"{inside / 'kernels' / 'example.py'} 7"
    assert mappings == str(inside / "mappings")
    assert version.startswith("xarch-kd ")


def test_every_mapping_file_of_the_wheel_is_valid(unpacked_wheel: Path, tmp_path: Path) -> None:
    code = """
from xarch_kd._layout import folder
from xarch_kd.mapping_file.load import load_mapping
files = sorted(folder("mappings").glob("*.yaml"))
for file in files:
    load_mapping(file)
print(len(files))
"""
    assert int(python(code, cwd=tmp_path, path=unpacked_wheel)) >= 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "xarch_kd" / "ops" / "reference").glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_an_operation_has_one_name_everywhere(path: Path) -> None:
    operations = ROOT / "xarch_kd" / "ops"
    assert (operations / path.name).is_file(), "contract and dispatch"
    assert (operations / "streaming" / path.name).is_file()
    assert (ROOT / "tests" / "ops" / f"test_{path.name}").is_file()
