"""State of optimizer, scheduler and random numbers in safetensors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from xarch_kd.errors import CheckpointError
from xarch_kd.testing.runs import flip_bit
from xarch_kd.training.state_files import random_state, read_tree, set_random_state, write_tree


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor", "Rprop", "LBFGS"])
def test_states_of_optimizers_and_schedulers_come_back_exactly(tmp_path: Path, kind: str) -> None:
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer: Any = getattr(torch.optim, kind)(weights, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 3))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = sum((weight**2).sum() for weight in weights)
        assert isinstance(value, torch.Tensor)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
        scheduler.step()
    for name, value in (("optimizer", optimizer.state_dict()), ("scheduler", scheduler.state_dict())):
        write_tree(tmp_path / name, value)
        assert same(read_tree(tmp_path / name), value)
    flip_bit(tmp_path / "optimizer")
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        read_tree(tmp_path / "optimizer")


def test_special_numbers_and_shared_memory_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    value = {"a": whole, "b": whole[2:4], "n": None, "inf": float("inf"), "t": (True, 1, "x"), 7: [0.1]}
    write_tree(tmp_path / "state", value)
    assert same(read_tree(tmp_path / "state"), value)


def test_random_numbers_continue(tmp_path: Path) -> None:
    write_tree(tmp_path / "random", random_state(torch.device("cpu")))
    expected = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]  # the global one
    set_random_state(read_tree(tmp_path / "random"), torch.device("cpu"))
    assert [random.random(), float(numpy.random.rand()), float(torch.rand(()))] == expected


def test_an_object_that_only_pickle_could_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be stored in state[\s\S]*builtins.object[\s\S]*adamw"):
        write_tree(tmp_path / "state", {"state": [object()]})
    assert not (tmp_path / "state").exists()
