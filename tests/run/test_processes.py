"""Two processes of one run: what they exchange, and that the failure of one ends both with its message."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.run.process_cases import main
from xarch_kd.run.processes import Processes, joined_processes
from xarch_kd.testing.launch import on_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of every case of `process_cases.py`, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(2, main, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_ranks_exchange_values(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["exchange"] == {
            "gather": ["rank 0", "rank 1"],
            "from_main": 10,
            "any": [True, False],
            "found": rank == 1,
            "device": f"cuda:{rank}",
        }


def test_ranks_with_different_data_are_refused_with_both_fingerprints(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        message = found["different_data"]
        assert message.startswith("UsageError: the processes of this run differ in their data")
        assert "rank 0: 000000000000, rank 1: 111111111111" in message


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [("one_fails", "DataError", "the text is too short"), ("one_fails_in_a_step", "KeyError", "a bug")],
)
def test_the_failure_of_one_rank_ends_the_other_with_its_message(
    ranks: list[dict[str, Any]], case: str, error: str, message: str
) -> None:
    assert ranks[1][case].startswith(f"{error}: ") and message in ranks[1][case]
    assert ranks[0][case].startswith("ProcessError: rank 1 of this run failed: ") and message in ranks[0][case]
    assert ranks[0][f"{case} seconds"] < 30


def test_a_rank_that_does_not_come_ends_the_wait(ranks: list[dict[str, Any]]) -> None:
    assert "ended without a message, or does not answer" in ranks[0]["one_hangs"]
    assert ranks[0]["one_hangs seconds"] < 30


def test_one_process_needs_no_group() -> None:
    with joined_processes(torch.device("cpu")) as processes:
        assert processes == Processes()
        assert processes.is_main
        assert processes.gather(3) == [3]
        processes.check_same({"data": "x"})
        with processes.main_first():
            assert not torch.distributed.is_initialized()
