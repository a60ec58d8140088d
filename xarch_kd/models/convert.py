"""From a Transformer teacher to a stock hybrid student whose kept blocks are the teacher's, exactly."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.bamba import bamba_config
from xarch_kd.models.facts import TeacherFacts, teacher_facts
from xarch_kd.models.keep import kept_layers

Selection = str | Sequence[int] | None


def student_config(
    teacher: PreTrainedConfig,
    *,
    mixer: str = "mamba2",
    keep_attention: Selection = None,
    replace: Selection = None,
    target: str = "auto",
) -> PreTrainedConfig:
    """Return the config of the student that `convert` would build; no weights are needed.

    Raises `UsageError` for a selection that does not fit, `ConversionError` for a teacher that no stock class holds.
    """
    _check_names(mixer, target)
    facts = teacher_facts(teacher)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return bamba_config(facts, kept, teacher)


def conversion_warnings(
    teacher: PreTrainedConfig,
    *,
    keep_attention: Selection = None,
    replace: Selection = None,
) -> tuple[str, ...]:
    """Return what a user should know before converting: one sentence each."""
    facts = teacher_facts(teacher)
    kept = kept_layers(facts.layers, keep_attention=keep_attention, replace=replace)
    return tuple(_warnings(facts, kept))


def _warnings(facts: TeacherFacts, kept: Sequence[int]) -> list[str]:
    found = []
    if len(kept) == 0:
        found.append(
            "No block keeps its attention: generation with a cache fails in a stock class whose blocks are all recurrent "
            "(use_cache=False works). Keep at least one attention block if the student is to generate."
        )
    if len(kept) == facts.layers:
        found.append("Every block keeps its attention: the student is the teacher in another class.")
    if facts.tied and facts.is_scaled:
        found.append(
            f"The teacher's multipliers are folded into its weights, which unties the head: "
            f"{facts.vocabulary * facts.width:,} more parameters."
        )
    if facts.activation not in ("silu", "swish") and len(kept) < facts.layers:
        found.append(
            f"The mixers' convolutions use the teacher's activation {facts.activation}, which the fused Mamba-2 training "
            "kernels refuse; the PyTorch path runs it."
        )
    return found


def _check_names(mixer: str, target: str) -> None:
    if mixer != "mamba2":
        raise ConversionError("There is no conversion to this mixer.", asked=mixer, allowed="mamba2")
    if target not in ("auto", "bamba"):
        raise ConversionError("There is no conversion to this class.", asked=target, allowed="auto, bamba")
