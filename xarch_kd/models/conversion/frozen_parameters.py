"""Parameters of a student that must not train, because the exactness of its conversion depends on them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from xarch_kd.models.conversion.qwen3_5 import BELOW_EPSILON, LINEAR_NORM
from xarch_kd.models.conversion.targets import Target
from xarch_kd.models.conversion.teacher_spec import TeacherSpec


def frozen_in_blocks(spec: TeacherSpec, target: Target, kept: Sequence[int]) -> tuple[str, ...]:
    """Return the parameters to freeze in a student of class `target` that keeps attention in the blocks `kept`."""
    if target.fit(spec) != "frozen":
        return ()
    has_bias = spec.input_bias or spec.output_bias
    return tuple(
        f"model.layers.{index}.self_attn.{name}.{kind}"
        for index in kept
        for name in LINEAR_NORM
        for kind in (("weight", "bias") if has_bias and name.endswith("_proj") else ("weight",))
    )


def frozen_parameters(student: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a student, converted or loaded, that must stay frozen.

    They are the queries, keys and norms of attention blocks whose norms `qwen3_5.py` made linear. A checkpoint has no
    note of that, but their weights show it: equal in all channels, and thousands of times the usual norm weight.
    """
    marked = [
        name.removesuffix("q_norm.weight")
        for name, parameter in student.named_parameters()
        if name.endswith("self_attn.q_norm.weight")
        and parameter.device.type != "meta"
        and bool((parameter == parameter[0]).all())
        and float(parameter.detach()[0]) > 1e-4 / BELOW_EPSILON
    ]
    return tuple(
        name
        for name, _ in student.named_parameters()
        for place in marked
        if name.startswith(place) and name.removeprefix(place).split(".")[0] in LINEAR_NORM
    )
