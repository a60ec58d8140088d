"""Base of all conversions: planned from the teacher's config alone, then built from the teacher's weights."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.check import check_exact, runnable
from xarch_kd.models.conversion.weights import check_finite, check_plain

Selection = str | Sequence[int] | None
Progress = Callable[[int, int], None]
MixerInit = Literal["attention", "random"]

# Keys of a config that do not change what a model computes.
_BOOKKEEPING = {"dtype", "_name_or_path", "transformers_version", "architectures", "_attn_implementation_internal"}


@dataclass(frozen=True, kw_only=True)
class Conversion(ABC):
    """Conversion of one teacher, whose blocks outside `kept` get new mixers.

    `config` is the student's config, `warnings` are sentences for the user, and `frozen` names the parameters of the
    student that must not train. `all_recurrent` is the warning for a student that keeps no attention.
    """

    all_recurrent: ClassVar[str]

    teacher_config: PreTrainedConfig
    config: PreTrainedConfig
    kept: tuple[int, ...]
    warnings: tuple[str, ...]
    frozen: tuple[str, ...] = ()

    def build(
        self,
        teacher: PreTrainedModel,
        *,
        init: MixerInit = "attention",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        check: bool = True,
        progress: Progress | None = None,
    ) -> PreTrainedModel:
        """Return the student with weights of `dtype`, in eval mode; `teacher` is not changed and shares no tensor.

        The new mixers start from the attention that they replace (`init="attention"`) or from random weights, drawn
        with `seed`. With `check` the conversion is checked first. Parameters in `frozen` do not require gradients.
        `progress` is called with the steps that are done (the check, the weights, the model) and their number.
        Raises ConversionError for an unknown `init`, for another teacher than planned and for a conversion that is not
        exact, ModelError for weights that are not finite; warns if no attention is left.
        """
        if init not in get_args(MixerInit):
            raise ConversionError(
                "Unknown initialization of the new mixers.",
                asked=f"init={init!r}",
                allowed=", ".join(get_args(MixerInit)),
            )
        self._check_teacher(teacher)
        if not self.kept:
            # The caller of `convert`, whose arguments are checked by a wrapper.
            warnings.warn(self.all_recurrent, UserWarning, stacklevel=4)
        report = progress or (lambda done, total: None)
        check_plain(teacher)
        check_finite(teacher.state_dict(), what="The teacher")
        if check:
            self.check(teacher)
        report(1, 3)
        state = self.state(teacher, dtype, seed=seed if init == "random" else None)
        check_finite(state, what=f"The converted student in {dtype}")
        report(2, 3)
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        student = runnable(config, state, teacher.device).requires_grad_(True)
        for name in self.frozen:
            student.get_parameter(name).requires_grad_(False)
        student.generation_config = copy.deepcopy(teacher.generation_config)
        report(3, 3)
        return student

    def check(self, teacher: PreTrainedModel) -> float:
        """Return the largest difference of logits with all attention kept. Raises ConversionError if not exact."""
        return check_exact(*self.all_attention_pair(teacher))

    @abstractmethod
    def all_attention_pair(self, teacher: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Return the teacher and its student with all attention kept, in eval mode, on the teacher's tensors."""

    @abstractmethod
    def state(self, teacher: PreTrainedModel, dtype: torch.dtype, *, seed: int | None) -> dict[str, Tensor]:
        """Return copies of all weights of the student; the new mixers are random if a seed is given."""

    def _check_teacher(self, teacher: PreTrainedModel) -> None:
        if teacher.config is self.teacher_config:
            return
        given, planned = teacher.config.to_dict(), self.teacher_config.to_dict()
        keys = sorted((given.keys() | planned.keys()) - _BOOKKEEPING)
        different = [key for key in keys if given.get(key) != planned.get(key)]
        if different:
            key = different[0]
            raise ConversionError(
                "The conversion was planned for another teacher.",
                asked=f"{key}: {planned.get(key)}",
                found=f"{key}: {given.get(key)}",
                fix="plan it with the config of the model that is converted",
            )
