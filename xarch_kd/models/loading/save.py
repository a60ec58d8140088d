"""Saving of a student as a stock checkpoint, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.files import seal, write_folder
from xarch_kd.models.conversion.weights import check_finite
from xarch_kd.models.layer_names import LayerNames, check_layer_names, rename_layers
from xarch_kd.models.loading.stored import check_weights


def save_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    overwrite: bool = False,
    layer_names: LayerNames = "transformers",
) -> Path:
    """Write `model` and `tokenizer` to `folder`, for plain `AutoModelForCausalLM.from_pretrained`, and return it.

    Everything is written beside `folder` first and renamed into place, so a full disk or a crash leaves what was
    there intact; `checksums.json`, written last, has the SHA-256 of each file. `layer_names` are those in its
    config (`models/layer_names.py`). Raises `UsageError` if `folder` holds something and `overwrite` is False,
    `ConversionError` for layer names that its class does not have, `ModelError` for NaN or infinite weights,
    `CheckpointError` if it cannot be written.
    """
    check_layer_names(model.config, layer_names)
    check_finite(model.state_dict(), what="The student")

    def write(scratch: Path) -> None:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        check_weights(scratch)
        if layer_names != "transformers":
            rename_layers(scratch)
        seal(scratch)

    return write_folder(Path(folder), write, overwrite=overwrite)
