"""Package of another revision with this checkout's benchmarks, so that both are measured in the same rounds."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.measure import Checkout

SUFFIX = " @ before"


@contextlib.contextmanager
def checked_out(reference: str, repository: Path = ROOT) -> Iterator[Checkout]:
    """Check `reference` out as a git worktree in a temporary folder, removed afterwards.

    Its workers import `benchmarks` from this checkout and `xarch_kd`, kernels included, from the other.

    Raises:
        ValueError: there is no such revision, or no git.
    """
    with tempfile.TemporaryDirectory() as temporary:
        tree, links = Path(temporary) / "tree", Path(temporary) / "links"
        _git(repository, "worktree", "add", "--detach", "--quiet", str(tree), reference)
        try:
            links.mkdir()
            (links / "benchmarks").symlink_to(ROOT / "benchmarks")
            for name in ("kernels", "mappings"):
                if (tree / name).is_dir() and not (tree / "xarch_kd" / name).exists():
                    (tree / "xarch_kd" / name).symlink_to(tree / name)
            yield Checkout(suffix=SUFFIX, root=tree, path=(links, tree))
        finally:
            _git(repository, "worktree", "remove", "--force", str(tree))


def commit_of(reference: str, repository: Path = ROOT) -> str:
    """Return the commit that a reference names.

    Raises:
        ValueError: there is no such revision, or no git.
    """
    return _git(repository, "rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}")


def _git(repository: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError("git is not installed") from error
    if done.returncode != 0:
        raise ValueError(f"git {arguments[0]} failed: {done.stderr.strip() or arguments[-1]}")
    return done.stdout.strip()
