"""The check that ends every conversion: with all attention kept, the student class gives the teacher's logits.

Some config fields are dropped by a class without a word (a rotary share, a multiplier, a mask). Only a comparison of
logits sees that, so it is made at each conversion, on a short batch, with the weights that were written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.targets import Target
from xarch_kd.models.conversion.teacher_spec import TeacherFacts
from xarch_kd.models.conversion.weights import TeacherWeights

ROWS, TOKENS = 2, 24


def check_logits(teacher: PreTrainedModel, facts: TeacherFacts, kept: Sequence[int], target: Target) -> float:
    """Return the largest difference of logits between a teacher and its all-attention student.

    Both run in float32 (float64 for a float64 teacher). The student borrows the teacher's tensors; a teacher of lower
    precision is read through one float32 copy, which is freed. Raises `ConversionError` above `logits_tolerance`.
    """
    reference = _reference(teacher, facts, kept)
    rotary = facts.rotary_layers[kept[0]] if len(kept) > 0 else True
    uniform = replace(facts, rotary_layers=(rotary,) * facts.layers)
    everything = range(facts.layers)
    config = target.config(uniform, everything, teacher.config)
    weights = TeacherWeights(reference, target.read_as(uniform))
    state = {name: value.to(reference.dtype) for name, value in target.state(weights, everything).items()}
    student = runnable(config, state, teacher.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, facts.vocabulary, (ROWS, TOKENS), generator=generator).to(teacher.device)
    with torch.no_grad():
        expected = reference(tokens, use_cache=False).logits
        found = student(tokens, use_cache=False).logits
    difference = float((expected - found).abs().max())
    largest = float(expected.abs().max())
    tolerance = logits_tolerance(largest, facts.layers, expected.dtype)
    if not difference <= tolerance:
        raise ConversionError(
            "The conversion is not exact: with all attention kept, the student's logits are not the teacher's.",
            asked=f"{facts.model_type} to {config.model_type}",
            found=f"largest difference {difference:.3g}, where the logits reach {largest:.3g}",
            allowed=f"{tolerance:.3g}",
            fix="report it with the teacher's config.json: a field of it is not carried over",
        )
    return difference


def logits_tolerance(largest: float, layers: int, dtype: torch.dtype) -> float:
    """Return the difference of logits that rounding alone can make.

    Each block is two sub-blocks whose sums round by a few units of `eps` of their size; independent errors add as the
    root of their number, and the final projection scales them with the logits themselves. The factor 64 covers the
    growth of an error through the blocks after it; a dropped config field moves logits by their own size.
    """
    return 64 * torch.finfo(dtype).eps * math.sqrt(2 * layers) * max(largest, 1.0)


def runnable(config: PreTrainedConfig, state: Mapping[str, Tensor], device: torch.device) -> PreTrainedModel:
    """Return a model of `config` whose parameters are the very tensors of `state`, in eval mode, without gradients."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    return model.eval()


def _reference(teacher: PreTrainedModel, facts: TeacherFacts, kept: Sequence[int]) -> PreTrainedModel:
    """Return the teacher itself, or a twin that runs in float32 and treats positions in every block as `kept` do."""
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    mixed = len(set(facts.rotary_layers)) > 1
    if mixed:
        rotary = facts.rotary_layers[kept[0]] if len(kept) > 0 else True
        config.update({"no_rope_layers": [int(rotary)] * facts.layers})
    if not mixed and teacher.dtype in (torch.float32, torch.float64) and not teacher.training:
        return teacher
    state = {
        name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in teacher.state_dict().items()
    }
    return runnable(config, state, teacher.device)
