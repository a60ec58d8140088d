"""Conversion of a Transformer teacher into a stock hybrid student whose kept blocks equal the teacher's exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError, renamed_arguments
from xarch_kd.mapping_file.schema import MixerName, TargetName
from xarch_kd.models.conversion.base import Conversion, MixerInit, Progress, Selection
from xarch_kd.models.conversion.check import runnable
from xarch_kd.models.conversion.frozen_parameters import frozen_in_blocks
from xarch_kd.models.conversion.layer_selection import kept_layers
from xarch_kd.models.conversion.mamba2_options import mamba2_option_notices, set_mamba2_options
from xarch_kd.models.conversion.new_mixers import new_mixers
from xarch_kd.models.conversion.targets import Target, choose_target
from xarch_kd.models.conversion.teacher_spec import TeacherSpec, teacher_spec
from xarch_kd.models.conversion.weights import TeacherWeights
from xarch_kd.models.in_place.teachers import WINDOW

IN_PLACE = "in_place"

NO_ATTENTION = (
    "No block keeps its attention: generation with a cache fails in a stock class whose blocks are all recurrent "
    "(use_cache=False works). Keep at least one attention block if the student has to generate."
)


@renamed_arguments(initialisation="init")
def convert(
    teacher: PreTrainedModel,
    *,
    mixer: MixerName | str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: TargetName | str = "auto",
    mamba2: Mapping[str, Any] | None = None,
    window: int | None = None,
    sinks: int = 0,
    init: MixerInit = "attention",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Return a copy of the teacher whose blocks outside `keep_attention` have a new mixer, in a stock class.

    `mixer` is `mamba2`, `gated_delta`, or `window`: the block's own attention, which sees the last `window` tokens and
    the first `sinks` ones, so that logits are the teacher's for up to `window` + `sinks` tokens. `target` is a stock
    class that has it (`targets.py`), `auto` for the one that fits best, or `in_place` for the teacher's own class with
    new mixers, which is not stock and the only one with a window. `keep_attention`, or its complement `replace`, are
    block indices or words such as `every 4` (`layer_selection.py`). `mamba2` sets `expand`, `proj_bias` and `n_groups`
    of Mamba-2 mixers in a stock class. For the other arguments see `Conversion.build`. Raises UsageError for a
    selection that does not fit, ConversionError for a teacher that the class cannot hold, for sizes that its heads do
    not fit or a conversion that is not exact; warns if no attention is left.

    >>> import xarch_kd as xkd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> teacher = LlamaForCausalLM(config).eval()
    >>> student = xkd.convert(teacher, mixer="mamba2", keep_attention=[0])
    >>> type(student).__name__, student.config.layer_types
    ('GraniteMoeHybridForCausalLM', ['full_attention', 'linear_attention'])
    """
    conversion = plan_conversion(
        teacher.config,
        mixer=mixer,
        keep_attention=keep_attention,
        replace=replace,
        target=target,
        window=window,
        sinks=sinks,
        mamba2=mamba2,
    )
    return conversion.build(teacher, init=init, seed=seed, dtype=dtype, check=check, progress=progress)


def plan_conversion(
    teacher: PreTrainedConfig,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
    mamba2: Mapping[str, Any] | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> Conversion:
    """Return the conversion of a teacher with this config; no weights are needed. Arguments are those of `convert`.

    Raises UsageError for a selection that does not fit, ConversionError for a teacher that no stock class holds.
    """
    if mamba2 is not None and (target == IN_PLACE or mixer != "mamba2"):
        raise ConversionError(
            "These sizes are those of Mamba-2 mixers in a stock class.",
            asked=f"mamba2: {dict(mamba2)}, mixer: {mixer}, target: {target}",
            fix="remove mamba2, or use mixer: mamba2 and a stock class",
        )
    if mixer == WINDOW and target not in ("auto", IN_PLACE):
        raise ConversionError(
            "No stock class has a window in some blocks, with tokens that are seen from outside it.",
            asked=f"mixer: {mixer}, target: {target}",
            allowed=f"auto, {IN_PLACE}",
        )
    if mixer != WINDOW and (window is not None or sinks):
        raise ConversionError("Only the mixer window has a window and sinks.", asked=f"mixer: {mixer}")
    if target == IN_PLACE or mixer == WINDOW:
        # The classes of its families are built on import.
        from xarch_kd.models.in_place.convert import plan_in_place

        return plan_in_place(
            teacher, mixer=mixer, keep_attention=keep_attention, replace=replace, window=window, sinks=sinks
        )
    spec = teacher_spec(teacher)
    chosen = choose_target(spec, mixer=mixer, target=target)
    kept = kept_layers(spec.layers, keep_attention=keep_attention, replace=replace)
    config, options = chosen.config(spec, kept, teacher), mamba2 or {}
    set_mamba2_options(config, options, spec)
    return StockConversion(
        teacher_config=teacher,
        config=config,
        kept=kept,
        warnings=(*_warnings(spec, chosen, kept), *mamba2_option_notices(options, spec)),
        frozen=frozen_in_blocks(spec, chosen, kept),
        spec=spec,
        target=chosen,
    )


@dataclass(frozen=True, kw_only=True)
class StockConversion(Conversion):
    """Conversion into the stock class `target`."""

    all_recurrent: ClassVar[str] = NO_ATTENTION

    spec: TeacherSpec
    target: Target

    def state(self, teacher: PreTrainedModel, dtype: torch.dtype, *, seed: int | None) -> dict[str, Tensor]:
        """See `Conversion`. Raises ConversionError for weights without a place in the student."""
        weights = TeacherWeights(teacher, self.target.read_as(self.spec))
        made = self.target.state(weights, self.kept)
        if weights.unread():
            raise ConversionError(
                "The teacher has weights that the student has no place for.", found=", ".join(weights.unread()[:4])
            )
        made |= new_mixers(teacher, self.spec, self.target, self.kept, self.config, seed=seed)
        state = {name: value.to(dtype, copy=True) for name, value in made.items()}
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def all_attention_pair(self, teacher: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
        """See `Conversion`. Both are in float32, or float64 for a float64 teacher; narrower weights are copied."""
        reference = self._reference(teacher)
        uniform = replace(self.spec, rotary_layers=(self._is_rotary,) * self.spec.layers)
        everything = range(self.spec.layers)
        weights = TeacherWeights(reference, self.target.read_as(uniform))
        state = {name: value.to(reference.dtype) for name, value in self.target.state(weights, everything).items()}
        config = self.target.config(uniform, everything, teacher.config)
        return reference, runnable(config, state, teacher.device)

    @property
    def _is_rotary(self) -> bool:
        """Rotary positions in the kept blocks, which all have the same; True if none is kept."""
        return self.spec.rotary_layers[self.kept[0]] if self.kept else True

    def _reference(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Return the teacher itself, or a float32 twin that treats positions in every block as the kept ones do."""
        config = type(teacher.config).from_dict(teacher.config.to_dict())
        mixed = len(set(self.spec.rotary_layers)) > 1
        if mixed:
            config.update({"no_rope_layers": [int(self._is_rotary)] * self.spec.layers})
        if not mixed and teacher.dtype in (torch.float32, torch.float64) and not teacher.training:
            return teacher
        state = {
            name: value.to(torch.promote_types(value.dtype, torch.float32))
            for name, value in teacher.state_dict().items()
        }
        return runnable(config, state, teacher.device)


def _warnings(spec: TeacherSpec, target: Target, kept: Sequence[int]) -> Iterator[str]:
    replaced = spec.layers - len(kept)
    if not kept:
        yield NO_ATTENTION
    if replaced == 0:
        yield "Every block keeps its attention: the student is the teacher in another class."
    if target.fit(spec) == "frozen":
        yield (
            f"The teacher has no query and key norms and {target.name} does: they are made linear by scaling, which "
            "holds in float32 and bfloat16 but not in float16, and only while the queries, keys and their norms of the "
            "kept blocks stay frozen. The student is best used as an initialization."
        )
    if spec.tied and target.read_as(spec).is_scaled:
        yield (
            f"The teacher's multipliers are folded into its weights, which unties the head: "
            f"{spec.vocabulary * spec.width:,} more parameters."
        )
    if spec.activation not in ("silu", "swish") and replaced > 0:
        yield (
            f"The mixers' convolutions use the teacher's activation {spec.activation}, which the fused training "
            "kernels refuse; the PyTorch path runs it."
        )
    if spec.norm_after and replaced > 0:
        yield (
            "In a replaced block the norms precede mixer and MLP, while the teacher's follow them: its MLP starts near "
            "the teacher's, not equal to it."
        )
    if spec.norm_after and replaced == 0:
        yield "The class needs a recurrent block, so one that adds nothing is appended."
