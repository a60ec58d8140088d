"""mamba_ssm itself, with its own reference functions, gives the logits of the stock model that a folder came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.mamba_ssm_peer import needs_mamba_ssm
from tests.models.mamba_ssm_logits import main
from tests.models.test_mamba_ssm import CASES, GRANITES, model_of
from xarch_kd.files import CHECKSUM_FILE
from xarch_kd.models.mamba_ssm.format import WEIGHTS, export_mamba_ssm, import_mamba_ssm
from xarch_kd.testing.launch import in_a_fork
from xarch_kd.testing.tiny import VOCABULARY

pytestmark = needs_mamba_ssm

IDS = torch.randint(1, VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(9))


def swap_halves(state: dict[str, Tensor]) -> None:
    """Gate and up of every MLP the other way round."""
    for name, value in state.items():
        if name.endswith("mlp.fc1.weight"):
            state[name] = torch.cat(value.chunk(2)[::-1])


def swap_keys_and_values(state: dict[str, Tensor]) -> None:
    """Keys and values of the attention the other way round."""
    query, key, value = state["backbone.layers.1.mixer.in_proj.weight"].split([64, 32, 32])
    state["backbone.layers.1.mixer.in_proj.weight"] = torch.cat([query, value, key])


WRONG = {"gate first": swap_halves, "values first": swap_keys_and_values}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders in mamba_ssm's format, each with the logits that mamba_ssm gave."""
    root = tmp_path_factory.mktemp("exported")
    torch.save(IDS, root / "ids.pt")
    for name in (*CASES, *GRANITES):
        export_mamba_ssm(model_of(name), root / name)
    for name, change in WRONG.items():
        folder = export_mamba_ssm(model_of("bamba"), root / name)
        (folder / CHECKSUM_FILE).unlink()
        state = torch.load(folder / WEIGHTS, weights_only=True)
        change(state)
        torch.save(state, folder / WEIGHTS)
    in_a_fork(main, root)
    return root


@torch.no_grad()
def difference(folder: Path, name: str) -> tuple[float, float]:
    """The largest difference of logits from those of the stock model, and what rounding can make.

    That is 4 times what one more rounding of every weight does to the stock model itself: both models round several
    times an operation, in other orders, and norms of small numbers inside random mixers make much of it.
    """
    expected = model_of(name)(IDS, use_cache=False).logits
    rounded, generator = model_of(name), torch.Generator().manual_seed(1)
    for parameter in rounded.parameters():
        step = torch.randn(parameter.shape, generator=generator) * torch.finfo(parameter.dtype).eps
        parameter.mul_(1.0 + step)
    tolerance = 4.0 * float((rounded(IDS, use_cache=False).logits - expected).abs().max())
    found = torch.load(folder / "logits.pt", weights_only=True)
    assert found.shape == expected.shape
    return float((found - expected).abs().max()), tolerance


@pytest.mark.parametrize("name", [*CASES, *GRANITES])
def test_the_logits_are_those_of_the_stock_model(name: str, folders: Path) -> None:
    found, tolerance = difference(folders / name, name)
    assert found <= tolerance


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_map_shows(name: str, folders: Path) -> None:
    found, tolerance = difference(folders / name, "bamba")
    assert found > 1000 * tolerance


@pytest.mark.parametrize("name", CASES)
def test_what_the_package_saves_is_read(name: str, folders: Path) -> None:
    back = import_mamba_ssm(folders / name / "saved").state_dict()
    assert [key for key, value in model_of(name).state_dict().items() if not value.equal(back[key])] == []
