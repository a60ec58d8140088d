"""Settings and fixtures of the whole suite: no network, quiet libraries, interpreted kernels."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Set before any test imports transformers, which reads them at import; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# Read when triton is first imported: kernels run in its interpreter, on the CPU. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a processor of its own; threads of several would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the token store, and what the library datasets writes, out of the home folder; subprocesses inherit it."""
    os.environ["XARCH_KD_CACHE"] = str(tmp_path_factory.mktemp("xarch-kd-cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets-cache"))


# Files whose fixtures take long. Tests are taken over from the end of another worker's, so that these are not divided.
FIRST = ("test_ranks.py", "test_smollm2.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection, which otherwise looks at all of it after every stage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo the exemption: libraries report what is not collected at exit as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """A frozen Llama."""
    from xarch_kd.testing.tiny import tiny_model

    return tiny_model("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def teacher_folder(teacher: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its tokenizer, saved as a checkpoint."""
    from xarch_kd.testing.tiny import tiny_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def input_ids() -> Tensor:
    """Two rows of 16 tokens."""
    import torch

    return torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(0))
