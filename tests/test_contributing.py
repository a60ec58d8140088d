"""CONTRIBUTING.md lists every source file that a new name touches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a reader of such a mixer's matrix or cache, the in-place classes and test helpers name it for is not part of a
# conversion.
ELSEWHERE = (
    *("taps/", "mixing/", "in_place/", "testing/", "generation/"),
    *("planning/mixing_sizes.py", "models/cache_size.py"),
    # The meanings of keys, which CONTRIBUTING.md names for every name.
    "mapping_file/key_help.py",
)


def listed(heading: str) -> list[str]:
    """Return the files of the list under a heading, and check them against the number that it gives."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^{heading}, (\d) files[^\n]*:\n\n((?:- .*\n)+)", text, re.MULTILINE)
    assert found is not None
    files = re.findall(r"^- `([^`]+)`", found[2], re.MULTILINE)
    assert len(files) == int(found[1])
    return files


def named_in(*words: str) -> set[str]:
    """Return the source files of the package in which one of these words stands."""
    files = (ROOT / "xarch_kd").rglob("*.py")
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", path.read_text(encoding="utf-8")) for word in words)
    }


@pytest.mark.parametrize(
    ("heading", "words", "most"),
    [
        ("A feature loss", ('"huber"', "Huber"), 4),
        ("A divergence", ('"renyi"', "RenyiDivergence", "def renyi"), 4),
        ("A mixer to convert to", ('"gated_delta"', "delta_from_attention", "qwen3_5_state", "delta_shape"), 5),
    ],
)
def test_a_name_touches_the_files_that_are_listed(heading: str, words: tuple[str, ...], most: int) -> None:
    files = listed(heading)
    assert len(files) <= most
    # One name stands for any: the mixer's own two files are those of the gated delta rule.
    own = {"NAME_mixers": "delta_mixers", "CLASS": "qwen3_5"}
    known = {re.sub("NAME_mixers|CLASS", lambda match: own[match[0]], file) for file in files}
    touched = {file for file in named_in(*words) if not any(part in file for part in ELSEWHERE)}
    assert touched - {"xarch_kd/models/conversion/olmo_hybrid.py"} == known
