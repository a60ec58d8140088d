"""Change of the epsilon of a teacher's norms, for student formats with a fixed epsilon.

    RMSNorm(x; ε₁) = RMSNorm(√(ε₂/ε₁) x; ε₂)

so the whole residual stream is scaled: the embedding and the outputs of attention and MLPs. A tied head is scaled with
the embedding, which the weight of the final norm undoes.
"""

from __future__ import annotations

import copy
import math

from transformers import PreTrainedModel

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.check import runnable
from xarch_kd.models.conversion.teacher_spec import teacher_spec

SCALED = ("embed_tokens.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")


def with_epsilon(teacher: PreTrainedModel, epsilon: float) -> PreTrainedModel:
    """Return a teacher that gives the logits of `teacher` up to rounding, with norms of `epsilon`, in eval mode.

    Its residual stream is √(epsilon / its own) times the teacher's. Raises `ConversionError` for a teacher with norms
    of queries and keys or after its sub-blocks, and for one of a type that does not convert.
    """
    spec = teacher_spec(teacher.config)
    if spec.norm_after or spec.query_key_norm is not None:
        raise ConversionError(
            f"The epsilon of a {spec.model_type} teacher cannot be moved by scaling its residual stream.",
            found="norms after its sub-blocks" if spec.norm_after else "norms of queries and keys",
            allowed="norms before attention, before the MLP and before the head",
        )
    scale = math.sqrt(epsilon / spec.epsilon)
    state = {
        name: value * scale if name.endswith(SCALED) else value.clone() for name, value in teacher.state_dict().items()
    }
    if spec.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        state["model.norm.weight"] = (state["model.norm.weight"] + spec.norm_offset) / scale - spec.norm_offset
    config = copy.deepcopy(teacher.config)
    config.update({"rms_norm_eps": epsilon})
    model = runnable(config, state, teacher.device).requires_grad_(True)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model
