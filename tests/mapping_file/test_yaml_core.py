from __future__ import annotations

import math
from typing import Any

import pytest

from xarch_kd.errors import MappingFileError
from xarch_kd.mapping_file.yaml_core import read_yaml


# The left column is YAML 1.2's core schema; YAML 1.1 reads several of them otherwise.
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("0o17", 15),
        ("0x1F", 31),
        ("0123456", 123456),
        ("+3", 3),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("22:30", "22:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
        ("~", None),
        ("null", None),
        ("", None),
        ("''", ""),
        ("[1, [a], {b: c}]", (1, ("a",), {"b": "c"})),
    ],
)
def test_scalars(written: str, value: Any) -> None:
    read = read_yaml(f"key: {written}\n", "x")[0]["key"]
    assert read == value and type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read_yaml("key: .nan", "x")[0]["key"])


def test_positions_are_counted_from_one() -> None:
    _, source_map, _ = read_yaml("a:\n  - b: 1\n    c: [2, 3]\n", "x")
    assert (source_map.keys[("a", 0, "c")].line, source_map.keys[("a", 0, "c")].column) == (3, 5)
    assert (source_map.values[("a", 0, "c", 1)].line, source_map.values[("a", 0, "c", 1)].column) == (3, 12)


@pytest.mark.parametrize("text", ['"\\UFFFFFFFF"', "%YAML " + "9" * 5000 + ".1\n--- a", "a: b: c", "[", "'"])
def test_what_is_not_yaml_is_a_mapping_file_error(text: str) -> None:
    with pytest.raises(MappingFileError, match="not valid YAML"):
        read_yaml(text, "x")


def test_half_a_surrogate_pair_is_refused() -> None:
    _, _, problems = read_yaml('a: "\\uD800"\n"\\uD800": 1', "x")
    assert [problem.message for problem in problems] == [
        "holds half of a surrogate pair, which is no character",
        "a key must be text; put it in quotes",
    ]
