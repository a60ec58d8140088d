from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xarch_kd.testing import recurrent
from xarch_kd.testing.tiny import SIZES, VOCABULARY, seeded_model, tiny_config, tiny_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """Return a builder of tiny models of any type; unknown types get Llama's sizes and random weights."""

    def build(model_type: str, **overrides: Any) -> PreTrainedModel:
        if model_type in SIZES:
            return tiny_model(model_type, **overrides)
        if model_type in recurrent.SIZES:
            return recurrent.recurrent_model(model_type, **overrides)
        sizes = {**SMALL, **overrides}
        return seeded_model(lambda: AutoConfig.for_model(model_type, **sizes), perturb, 3, (model_type, overrides))

    return build


def perturb(name: str, parameter: nn.Parameter) -> None:
    """Draw what multiplies a vector anew, at the size at which it keeps the vector's."""
    if parameter.ndim > 1 and "embed" not in name:
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


@pytest.fixture
def build_meta() -> Callable[..., PreTrainedModel]:
    """The same model on the meta device: no weights."""

    def build_meta(model_type: str, **overrides: Any) -> PreTrainedModel:
        if model_type in SIZES:
            config = tiny_config(model_type, **overrides)
        elif model_type in recurrent.SIZES:
            config = recurrent.recurrent_model(model_type, **overrides).config
        else:
            config = AutoConfig.for_model(model_type, **{**SMALL, **overrides})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    return build_meta


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def count_hooks() -> Callable[[nn.Module], int]:
    def count(model: nn.Module) -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    return count
