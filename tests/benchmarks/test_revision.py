"""Worktree of another revision, and the package that its workers import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import ROOT
from benchmarks.revision import checked_out, commit_of

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(repository: Path, *arguments: str) -> str:
    author = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.invalid"]
    done = subprocess.run(["git", *author, *arguments], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose first commit has a package and kernels, and whose second changes the package."""
    root = tmp_path / "repository"
    (root / "xarch_kd").mkdir(parents=True)
    (root / "kernels").mkdir()
    (root / "xarch_kd" / "__init__.py").write_text("WHICH = 'first'\n")
    (root / "kernels" / "tiles.py").write_text("WHICH = 'first'\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    (root / "xarch_kd" / "__init__.py").write_text("WHICH = 'second'\n")
    git(root, "commit", "--quiet", "-am", "second")
    return root


def test_a_worker_imports_the_package_of_the_revision_and_the_benchmarks_of_here(repository: Path) -> None:
    code = (
        "import benchmarks, pathlib, xarch_kd; from xarch_kd.kernels import tiles; "
        "print(xarch_kd.WHICH, tiles.WHICH, pathlib.Path(benchmarks.__file__).resolve().parent)"
    )
    with checked_out("HEAD~1", repository) as checkout:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, checkout.path))}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            cwd=checkout.path[0],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == ["first", "first", str(ROOT / "benchmarks")], done.stderr
        tree = checkout.root
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_the_worktree_goes_when_measuring_fails(repository: Path) -> None:
    with pytest.raises(KeyError), checked_out("HEAD", repository):
        raise KeyError
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_revision_that_is_not_there_is_an_error(repository: Path) -> None:
    assert commit_of("HEAD", repository) == git(repository, "rev-parse", "HEAD")
    with pytest.raises(ValueError, match="git rev-parse failed"):
        commit_of("no-such-revision", repository)
    with pytest.raises(ValueError, match="git worktree failed"), checked_out("no-such-revision", repository):
        pass
