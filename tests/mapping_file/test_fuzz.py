"""Whatever a file holds, reading it either works or raises a MappingFileError with printable text."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xarch_kd.errors import MappingFileError
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.mapping_file.schema import MappingFile

BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
KEYS = [
    *("version", "teacher", "student", "data", "seed", "stages", "evaluate", "model", "config", "convert", "mixer"),
    *("replace", "keep_attention", "builtin", "files", "dataset", "name", "steps", "train", "inputs", "align", "tap"),
    *("layers", "loss", "kind", "weight", "projector", "tokens", "optimizer", "betas", "lr", "cache", "where", "also"),
    *("paths", "blocks", "extra"),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["same", "mse", "cosine", "mamba2", "mixers", "teacher", "every 4", "hidden", "memory", "str", ""]),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
        st.dictionaries(SCALARS, inner, max_size=2),
    ),
    max_leaves=15,
)


def check(text: str) -> None:
    """Either problems that can be printed, or a mapping that reads back as itself; nothing else is raised."""
    try:
        mapping, _ = parse_mapping(text, "map.yaml")
    except MappingFileError as error:
        assert error.problems
        assert all(problem.startswith("map.yaml") for problem in error.problems)
        str(error).encode()
        return
    assert MappingFile.model_validate_json(mapping.model_dump_json()) == mapping


@BOUNDED
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    check(text)


@BOUNDED
@given(st.text(alphabet="ab:-?[]{},&*!|>'\"#%@ \n\t0.~<", max_size=80))
def test_text_of_yaml_signs(text: str) -> None:
    check(text)


@BOUNDED
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_any_plain_data(data: dict[str, Any]) -> None:
    check(yaml.safe_dump(data))


@BOUNDED
@given(data=st.data())
def test_a_good_file_with_one_value_replaced(good: str, data: st.DataObject) -> None:
    content = yaml.safe_load(good)
    spots = list(_spots(content))
    container, key = data.draw(st.sampled_from(spots))
    container[key] = data.draw(VALUES)
    check(yaml.safe_dump(content))


@BOUNDED
@given(st.integers(0, 700), st.integers(0, 12), st.text(alphabet="ab:-[]{}&*! \n\t0'", max_size=3))
def test_a_good_file_with_characters_replaced(good: str, start: int, length: int, inserted: str) -> None:
    check(good[:start] + inserted + good[start + length :])


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of nested lists and mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, inner in items for spot in [(value, key), *_spots(inner)]]
