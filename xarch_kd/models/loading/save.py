"""Writing a student as a stock checkpoint: whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.models.conversion.weights import check_finite
from xarch_kd.models.loading.reference import check_weights


def save_student(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Write `model` and `tokenizer` to `folder`, for plain `AutoModelForCausalLM.from_pretrained`, and return it.

    Everything is written beside `folder` first and renamed into place, so a full disk or a crash leaves what was there
    intact. Raises `UsageError` if `folder` holds something and `overwrite` is False, `ModelError` for NaN or infinite
    weights, `CheckpointError` if it cannot be written.
    """
    check_finite(model.state_dict(), what="The student")

    def write(scratch: Path) -> None:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        check_weights(scratch)

    return save_whole(Path(folder), write, overwrite=overwrite)


def save_whole(folder: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Let `write` make a folder beside `folder`, rename it into place and return it: whole or not at all.

    Raises `UsageError` if `folder` holds something and `overwrite` is False, `CheckpointError` if it cannot be written.
    """
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already holds something.", fix="name a new folder, or allow it to be overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written.", found=str(error)) from error
    try:
        write(scratch / "new")
        if folder.exists():
            folder.rename(scratch / "old")
        (scratch / "new").rename(folder)
    except Exception as error:
        # safetensors raises an error of its own for a full disk; whatever stopped the write, what was there stays.
        if (scratch / "old").exists() and not folder.exists():
            (scratch / "old").rename(folder)
        raise CheckpointError(
            f"The student could not be written to {folder}; what was there before is intact.",
            found=str(error),
            fix="free some space or name another folder",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
