"""Language models whose next token depends on the last one alone, so that everything about them has a closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from xarch_kd.testing.tiny import tiny_model


def markov_model(transitions: NDArray[np.float64]) -> PreTrainedModel:
    """Return a Llama whose distribution after token i is row i of `transitions` [tokens, tokens].

    The number of tokens is a multiple of 8. Embeddings are one-hot, the mixer and the MLP add nothing, and no token
    ends a text.
    """
    tokens = len(transitions)
    model = tiny_model(
        "llama",
        vocab_size=tokens,
        hidden_size=tokens,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=0,
    )
    never_ending(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "embed" in name:
                parameter.copy_(torch.eye(tokens))
            elif name == "lm_head.weight":
                # The norm multiplies a one-hot vector by sqrt(tokens).
                parameter.copy_(torch.from_numpy(np.log(transitions).T / np.sqrt(tokens)))
    return model


def never_ending(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose texts no token ends any more."""
    settings: Any = model.generation_config
    settings.eos_token_id = None
    return model


def accumulated_errors(
    teacher: NDArray[np.float64], student: NDArray[np.float64], start: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return R and E by number of steps: sums of KL(teacher ‖ student), on the student's and on the teacher's text.

    `start` [tokens] is the distribution of the last token of a prompt.
    """
    error = (teacher * np.log(teacher / student)).sum(1)
    found = []
    for transitions in (student, teacher):
        state, errors = start, []
        for _ in range(steps):
            errors.append(state @ error)
            state = state @ transitions
        found.append(np.cumsum(errors))
    return found[0], found[1]
