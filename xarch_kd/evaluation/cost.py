"""Cost of the suites of an evaluation, in tokens and in seconds, before it begins."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from transformers import PreTrainedModel

from xarch_kd.evaluation.rollouts import CPU_ROWS
from xarch_kd.generation.sampling import Sampling, sample
from xarch_kd.taps.layout import run_base

if TYPE_CHECKING:
    from xarch_kd.evaluation.base import Subjects

# Tokens of the pass that is timed.
TIMED_TOKENS: Final = 128
# Steps of writing that are timed.
TIMED_STEPS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of each of the two models: tokens that it reads in whole rows, and steps of writing a batch of texts."""

    read: int = 0
    steps: int = 0


def sampling_cost(prompts: int, prompt: int, tokens: int, *, read_by_both: bool = True) -> Cost:
    """Return the cost of continuations of both models, each of which both models read."""
    width = prompt + tokens
    return Cost(read=prompts * (prompt + (2 * width if read_by_both else 0)), steps=-(-prompts // CPU_ROWS) * tokens)


def total_cost(parts: Iterable[Mapping[str, Cost]]) -> Cost:
    """Return the cost of all suites, parts of one name counted once."""
    every = {name: cost for suite in parts for name, cost in suite.items()}
    return Cost(read=sum(cost.read for cost in every.values()), steps=sum(cost.steps for cost in every.values()))


@torch.inference_mode()
def expected_seconds(subjects: Subjects, cost: Cost) -> float:
    """Return about how long both models need for a cost, from a timed pass and timed steps of each."""
    found = 0.0
    for layout in subjects.layouts:
        limit = getattr(layout.model.config.get_text_config(), "max_position_embeddings", None) or TIMED_TOKENS
        ids = torch.ones((1, min(TIMED_TOKENS, limit)), dtype=torch.long, device=layout.head_weight.device)
        run_base(layout, ids[:, :8])
        began = time.perf_counter()
        run_base(layout, ids)
        found += cost.read * (time.perf_counter() - began) / ids.shape[1]
        if cost.steps and hasattr(layout.model, "generate"):
            found += cost.steps * _step_seconds(layout.model, limit)
    return found


def _step_seconds(model: PreTrainedModel, limit: int) -> float:
    """Return the seconds of a step that adds a token to a batch of texts, a pass over the prompts left out."""
    prompts = [[1] * min(8, max(1, limit - TIMED_STEPS - 1))] * CPU_ROWS
    times = []
    for steps in (1, 1 + TIMED_STEPS):
        began = time.perf_counter()
        sample(model, prompts, Sampling(max_new_tokens=steps), end_of_sequence=[])
        times.append(time.perf_counter() - began)
    return max(0.0, times[1] - times[0]) / TIMED_STEPS
