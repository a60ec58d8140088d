"""Exactness check of conversions: with all attention kept, the student's logits must equal the teacher's.

Some config fields are silently dropped by a class (a rotary share, a multiplier, a mask). Only a comparison of logits
shows that, so every conversion makes it, on a short batch, with the weights that it writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import ConversionError

ROWS, TOKENS = 2, 24


@torch.no_grad()
def check_exact(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """Return the largest difference of logits between a teacher and its student with all attention kept.

    Both run on `ROWS` × `TOKENS` random tokens, always the same ones, in their own dtype. Raises ConversionError if the
    difference exceeds `logits_tolerance` or is NaN.
    """
    config = teacher.config.get_text_config()
    vocabulary: int = config.vocab_size  # type: ignore[assignment]  # a field of every family's config
    layers: int = config.num_hidden_layers  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator).to(teacher.device)
    expected = teacher(tokens, use_cache=False).logits
    difference = float((expected - student(tokens, use_cache=False).logits).abs().max())
    largest = float(expected.abs().max())
    tolerance = logits_tolerance(largest, layers, expected.dtype)
    if not difference <= tolerance:
        raise ConversionError(
            "The conversion is not exact: with all attention kept, the student's logits are not the teacher's.",
            asked=f"{config.model_type} to {student.config.model_type}",
            found=f"largest difference {difference:.3g}; the largest logit is {largest:.3g}",
            allowed=f"{tolerance:.3g}",
            fix="this class does not carry over a field of the teacher's config: try another target (target: in_place "
            "keeps the teacher's class), or build a fresh student (student: {config: …}), which is not converted",
        )
    return difference


def logits_tolerance(largest: float, layers: int, dtype: torch.dtype) -> float:
    """Return the difference of logits that rounding alone can make, for logits of at most `largest`.

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
