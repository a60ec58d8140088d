"""Names of a hybrid's layers in its `config.json`: those of transformers, or those that some servers expect.

SGLang, mlx-lm and the converter of llama.cpp take `attention` and `mamba` as the `layer_types` of a GraniteMoeHybrid,
where transformers saves `full_attention` and `linear_attention`. Transformers reads both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from xarch_kd.errors import ConversionError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LayerNames = Literal["transformers", "attention-mamba"]
RENAMED: Final = {"full_attention": "attention", "linear_attention": "mamba"}
# The class whose layers the servers name in another way.
MODEL_TYPE: Final = "granitemoehybrid"


def check_layer_names(config: PreTrainedConfig, names: LayerNames) -> None:
    """Raise `ConversionError` for a class whose layers have no other names."""
    if names != "transformers" and config.model_type != MODEL_TYPE:
        raise ConversionError(
            f"Servers use no other layer names for a model of type {config.model_type} than transformers does.",
            asked=f"layer names: {names}",
            allowed=f"{names} for {MODEL_TYPE}",
            fix="load the student as it is, without other layer names",
        )


def rename_layers(folder: Path) -> None:
    """Write the names `attention` and `mamba` into the `config.json` of a saved GraniteMoeHybrid."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["layer_types"] = [RENAMED.get(name, name) for name in config["layer_types"]]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
