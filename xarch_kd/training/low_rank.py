"""Low-rank adapters of a stage (LoRA, Hu et al. 2021) by peft, which become part of the weights when it ends."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import PreTrainedModel

from xarch_kd.planning.plan import StagePlan
from xarch_kd.taps.layout import Layout

# In the names of an adapter's parameters; the weight of the module that it wraps is under WRAPPED.
ADAPTER: Final = ".lora_"
WRAPPED: Final = ".base_layer."


class Adapters:
    """Adapters of a stage around modules of `student`, which start as no change; none without `lora` in its `train`."""

    def __init__(self, student: PreTrainedModel | Layout, stage: StagePlan, *, seed: int) -> None:
        self._adapted: Any = None
        if stage.lora is None:
            self.student = student
            return
        from peft import LoraConfig, LoraModel

        self.student = student.model if isinstance(student, Layout) else student
        options = stage.lora.options
        # A quotient by the rank is all that is made of it, so it need not be whole.
        alpha: Any = options.rank if options.alpha is None else options.alpha
        config = LoraConfig(
            r=options.rank,
            lora_alpha=alpha,
            target_modules=list(stage.lora.modules),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + stage.index)
            self._adapted = LoraModel(self.student, config, "default")

    def merge(self) -> None:
        """Add the adapters to the weights of the modules that they wrap, and unwrap these."""
        if self._adapted is not None:
            model = self._adapted.merge_and_unload(progressbar=False)
            # Left behind by some releases.
            vars(model).pop("peft_config", None)
            self._adapted = None


def own_name(name: str) -> str:
    """Return the name that a parameter has in a student without adapters."""
    return name.replace(WRAPPED, ".")
