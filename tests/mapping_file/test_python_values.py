"""Mapping files given as Python values: the same checks and messages as for a file, and text that reads back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given

from tests.mapping_file.test_fuzz import BOUNDED, SCALARS, VALUES
from xarch_kd.errors import MappingFileError, UsageError
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.mapping_file.python_values import mapping_as_yaml, mapping_from
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.testing.mapping import GOOD


def good() -> Any:
    return yaml.safe_load(GOOD.replace("1e-2", "0.01"))


def put(*steps: Any, value: Any) -> Callable[[Any], None]:
    """Return a change of one value of the good mapping."""

    def change(content: Any) -> None:
        for step in steps[:-1]:
            content = content[step]
        content[steps[-1]] = value

    return change


def problems_of(value: Any) -> list[str]:
    with pytest.raises(MappingFileError) as caught:
        mapping_from(value)
    return [problem.removeprefix("mapping: ") for problem in caught.value.problems]


def tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def test_lists_tuples_and_models_give_the_mapping_of_the_file() -> None:
    from_file, _ = parse_mapping(GOOD)
    assert mapping_from(good()) == mapping_from(tuples(good())) == mapping_from(from_file) == from_file
    mixed = {**good(), "stages": list(from_file.stages)}
    mixed["teacher"]["model"] = Path("teacher")
    assert mapping_from(mixed).teacher.model == "teacher"
    assert mapping_from(mixed).stages == from_file.stages


@pytest.mark.parametrize(
    "change",
    [
        put("extra", value=1),
        put("studnet", value=1),
        put("stages", 0, "align", 0, "tapp", value="hidden"),
        put("stages", 0, "align", 0, "loss", "kind", value="mce"),
        put("stages", 0, "align", 0, "loss", value={"kind": "mse", "distance": "frobenius"}),
        put("stages", 0, "steps", value=2.5),
        put("stages", 0, "steps", value="2"),
        put("stages", 0, "steps", value=True),
        put("stages", 0, "steps", value=0),
        put("stages", 0, "train", value="mixers"),
        put("stages", 0, "optimizer", "lr", value=float("nan")),
        put("stages", 0, "optimizer", "lr", value=float("inf")),
        put("stages", 1, "tokens", "divergence", value="forwardkl"),
        put("stages", value=[]),
        put("stages", value={}),
        put("student", "convert", "replace", value=[-1]),
        put("data", "sequence_length", value=10**30),
        put("version", value=1.0),
        put("seed", value=-1),
        lambda content: content.pop("teacher"),
        lambda content: content["stages"][0].update(steps=0, stepps=1),
    ],
)
def test_problems_are_those_of_the_file(change: Callable[[Any], None]) -> None:
    content = good()
    change(content)
    with pytest.raises(MappingFileError) as caught:
        parse_mapping(yaml.safe_dump(content, sort_keys=False), "map.yaml")
    of_file = {problem.splitlines()[0].split(": ", 1)[1] for problem in caught.value.problems}
    assert set(problems_of(content)) == of_file
    assert set(problems_of(tuples(content))) == of_file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(3, value=1), "a key must be text, found 3"),
        (put("stages", 0, None, value=1), "stages[0]: a key must be text, found None"),
        (put("stages", 0, "name", value=None), "stages[0].name: must be text, found nothing. If it is not wanted,"),
        (put("stages", 0, "steps", value=None), "stages[0]: exactly one of steps | epochs must be given"),
        (put("seed", value=np.int64(3)), "seed: must be a plain value, found numpy.int64. Allowed are text, numbers"),
        (put("seed", value=torch.tensor(3)), "seed: must be a plain value, found torch.Tensor"),
        (put("data", "builtin", value={"python-docs"}), "data.builtin: must be a plain value, found set"),
        (put("teacher", "model", value=b"teacher"), "teacher.model: must be a plain value, found bytes"),
        (put("teacher", "model", value="\ud800"), "teacher.model: holds half of a surrogate pair"),
        (put("stages", 0, "train", value=print), "stages[0].train: must be a plain value, found builtin_function"),
    ],
)
def test_values_that_no_file_can_hold_are_named(change: Callable[[Any], None], message: str) -> None:
    content = good()
    change(content)
    (problem,) = problems_of(content)
    assert problem.startswith(message)


def test_a_value_inside_itself_is_refused() -> None:
    content = good()
    content["data"]["files"] = content
    assert any("nested deeper than 20 levels" in problem for problem in problems_of(content))


def test_a_model_that_was_built_without_validation_is_checked() -> None:
    mapping, _ = parse_mapping(GOOD)
    assert problems_of(mapping.model_copy(update={"seed": "three"})) == ["seed: must be a whole number, found 'three'."]
    stage = mapping.stages[0].model_copy(update={"steps": 0})
    assert problems_of(mapping.model_copy(update={"stages": (stage,)})) == [
        "stages[0].steps: must be at least 1, found the number 0"
    ]


@pytest.mark.parametrize("value", [None, 3, [good()], (), b"x", object(), dataclasses])
def test_another_type_is_refused_with_what_is_allowed(value: object) -> None:
    with pytest.raises(UsageError, match=r"not a mapping file(.|\n)*allowed: +the path of a YAML file"):
        mapping_from(value)


@pytest.mark.parametrize("name", ["1e-4", "0o7", "no", "null", "22", "1e4", "0x1f"])
def test_text_that_looks_like_a_number_reads_back_as_text(name: str) -> None:
    content = good()
    content["stages"][1]["name"] = name
    mapping = mapping_from(content)
    assert parse_mapping(mapping_as_yaml(mapping))[0] == mapping


@BOUNDED
@given(VALUES, SCALARS)
def test_any_values(value: Any, scalar: Any) -> None:
    for content in (
        {"version": 1, "stages": value},
        {scalar: value},
        {**good(), "student": value},
        {**good(), "seed": scalar},
    ):
        kept = copy.deepcopy(content)
        try:
            mapping = mapping_from(content)
        except MappingFileError as error:
            assert error.problems
            str(error).encode()
        else:
            assert isinstance(mapping, MappingFile)
            assert parse_mapping(mapping_as_yaml(mapping))[0] == mapping
        assert repr(content) == repr(kept)
