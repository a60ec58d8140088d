"""Batched sampling: against decoding token by token, teacher-forced passes and closed-form distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import ModelError, UsageError
from xarch_kd.generation.sampling import Samples, Sampling, can_use_cache, ignores_left_padding, sample
from xarch_kd.models.conversion.convert import convert
from xarch_kd.testing.recurrent import recurrent_model
from xarch_kd.testing.tiny import VOCABULARY, tiny_model

PROMPTS = ([5, 6, 7, 8, 9], [11], [90, 3, 17, 44, 2, 61, 7, 5, 30], [31, 32, 33, 34, 35])
# Padded on the left: llama, gpt2 with learned positions, qwen3_5_text with a gated delta rule. Others run by length.
# "With bounds" is a finite time_step_limit, which the cache ignores, and a bias before the convolution.
MODELS = {
    "llama": lambda: tiny_model("llama", seed=3),
    "gpt2": lambda: tiny_model("gpt2", seed=3),
    "mamba2": lambda: tiny_model("mamba2", seed=3),
    "bamba": lambda: tiny_model("bamba", seed=3),
    "mamba2 with bounds": lambda: recurrent_model("mamba2"),
    "bamba with bounds": lambda: recurrent_model("bamba"),
    "bamba without attention": lambda: tiny_model("bamba", seed=3, attn_layer_indices=[]),
    "qwen3_5_text": lambda: recurrent_model("qwen3_5_text"),
    "recurrent_gemma": lambda: recurrent_model("recurrent_gemma"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny model with a generation setting that `sample` must not apply."""
    built: PreTrainedModel = MODELS[request.param]()
    built.generation_config.repetition_penalty = 5.0  # type: ignore[union-attr]
    return built


@torch.no_grad()
def logits_before(model: PreTrainedModel, samples: Samples, row: int) -> Tensor:
    """The logits [sampled tokens, vocabulary] that predict the sampled tokens of a row, from one pass of it alone."""
    ids = samples.input_ids[row][samples.attention_mask[row]]
    first = int(samples.sampled[row].nonzero()[0])
    return model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]


def test_greedy_equals_decoding_each_prompt_token_by_token(model: PreTrainedModel) -> None:
    samples = sample(model, PROMPTS, Sampling(max_new_tokens=6, temperature=0), end_of_sequence=[])
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert samples.input_ids[row, : len(ids)].tolist() == ids
        assert samples.attention_mask[row].tolist() == [True] * len(ids) + [False] * (15 - len(ids))
        assert samples.completions()[row] == ids[-6:]
        expected = logits_before(model, samples, row).log_softmax(-1).amax(-1)
        torch.testing.assert_close(samples.log_probs[row][samples.sampled[row]], expected, atol=1e-4, rtol=1e-4)
    assert not samples.sampling_log_probs.any() and not samples.ended.any()
    assert not samples.log_probs[~samples.sampled].any()
    assert model.generation_config.repetition_penalty == 5.0  # type: ignore[union-attr]


def test_log_probabilities_equal_a_teacher_forced_pass(model: PreTrainedModel) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.6, top_k=30, top_p=0.8)
    samples = sample(model, PROMPTS, sampling, seed=1, end_of_sequence=[])
    for row in range(len(PROMPTS)):
        logits = logits_before(model, samples, row)
        tokens = torch.tensor(samples.completions()[row])[:, None]
        own = logits.log_softmax(-1).gather(-1, tokens)[:, 0]
        torch.testing.assert_close(samples.log_probs[row][samples.sampled[row]], own, atol=1e-4, rtol=1e-4)
        # Nucleus of the 30 likeliest tokens: those after less than 0.8 of the probability, at least one.
        likeliest, order = (logits / 0.6).sort(descending=True)
        probability = likeliest[:, :30].softmax(-1)
        kept = torch.where(probability.cumsum(-1) - probability < 0.8, probability, 0)
        kept = kept / kept.sum(-1, keepdim=True)
        expected = torch.zeros_like(logits).scatter_(-1, order[:, :30], kept).gather(-1, tokens)[:, 0]
        drawn_from = samples.sampling_log_probs[row][samples.sampled[row]]
        torch.testing.assert_close(drawn_from, expected.log(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "bamba"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_samples_follow_from_the_prompt_and_its_seed_alone(model_type: str, batch_size: int | None) -> None:
    model, sampling = tiny_model(model_type, seed=3), Sampling(max_new_tokens=8)

    def completions(prompts: Sequence[Sequence[int]], seed: int | Sequence[int]) -> list[list[int]]:
        drawn = sample(model, prompts, sampling, seed=seed, batch_size=batch_size, end_of_sequence=[])
        return drawn.completions()

    whole = completions(PROMPTS, 4)
    assert completions(PROMPTS[::-1], [4] * 4) == whole[::-1]
    assert [completions([prompt], 4)[0] for prompt in PROMPTS] == whole
    assert completions([PROMPTS[0]] * 3, [4, 4, 5])[:2] == [whole[0]] * 2
    assert completions([PROMPTS[0]], 5)[0] != whole[0]


def test_the_model_and_torchs_random_state_are_left_as_they_were() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, sampling = torch.random.get_rng_state(), Sampling(max_new_tokens=4)
    drawn = sample(model, PROMPTS, sampling)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(drawn.input_ids, sample(model.eval(), PROMPTS, sampling).input_ids)


def test_tokens_are_drawn_as_often_as_the_distribution_gives_them() -> None:
    model, count = tiny_model("llama", seed=3), 4000
    samples = sample(model, [PROMPTS[0]] * count, Sampling(max_new_tokens=1, temperature=0.5), seed=range(count))
    with torch.no_grad():
        probabilities = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.5).softmax(-1)
    drawn = torch.bincount(samples.input_ids[:, 5], minlength=VOCABULARY).double()
    # Tokens that are expected less than 5 times are one class, which Pearson's test needs.
    is_rare = probabilities * count < 5
    observed, expected = (
        torch.cat([values[~is_rare], values[is_rare].sum()[None]]) for values in (drawn, probabilities * count)
    )
    assert stats.chisquare(observed.numpy(), expected.numpy() * count / float(expected.sum())).pvalue > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "mamba2"])
def test_a_row_stops_at_its_end_of_sequence(model_type: str) -> None:
    model, sampling = tiny_model(model_type, seed=3), Sampling(max_new_tokens=8)
    free = sample(model, PROMPTS, sampling, end_of_sequence=[]).completions()
    end = free[0][3]
    model.generation_config.eos_token_id = [end, free[2][5]]  # type: ignore[union-attr]
    samples = sample(model, PROMPTS, sampling)
    for row, tokens in enumerate(free):
        stops = [index for index, token in enumerate(tokens) if token in (end, free[2][5])]
        assert samples.completions()[row] == (tokens[: stops[0] + 1] if stops else tokens)
        assert bool(samples.ended[row]) == bool(stops)
    assert samples.ended.any() and len(samples.completions()[0]) <= 4


@pytest.mark.parametrize(
    ("build", "ignores", "caches"),
    [
        (lambda: tiny_model("llama"), True, True),
        (lambda: tiny_model("bamba"), False, True),
        (lambda: tiny_model("mamba"), False, True),
        (lambda: tiny_model("mamba2"), False, True),
        (lambda: tiny_model("bamba", attn_layer_indices=[]), False, False),
        (lambda: recurrent_model("mamba2"), False, False),
        (lambda: recurrent_model("nemotron_h"), False, False),
        (lambda: recurrent_model("recurrent_gemma"), False, False),
        (lambda: recurrent_model("qwen3_5_text"), True, True),
        (lambda: recurrent_model("lfm2"), True, True),
        (lambda: recurrent_model("lfm2", conv_bias=True), False, True),
        (lambda: convert(tiny_model("qwen3"), mixer="gated_delta", target="in_place", replace=[0, 2]), True, True),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_which_models_are_padded_and_decode_with_a_cache(build: Any, ignores: bool, caches: bool) -> None:
    model = build()
    assert (ignores_left_padding(model), can_use_cache(model)) == (ignores, caches)


@pytest.mark.parametrize(
    ("prompts", "settings", "seed", "message"),
    [
        ([], {}, 0, "no prompt"),
        ([[1], []], {}, 0, "Prompt 1 holds no token"),
        ([[1, VOCABULARY]], {}, 0, "outside the model's vocabulary"),
        ([[-1]], {}, 0, "outside the model's vocabulary"),
        ([[1] * 510], {}, 0, "do not fit into the model's context"),
        ([[1]], {}, [0, 1], "one seed"),
        ([[1]], {"max_new_tokens": 0}, 0, "max_new_tokens 0"),
        ([[1]], {"temperature": -1.0}, 0, "temperature -1"),
        ([[1]], {"temperature": float("nan")}, 0, "temperature nan"),
        ([[1]], {"top_k": 0}, 0, "top_k 0"),
        ([[1]], {"top_p": 0.0}, 0, "top_p 0"),
    ],
)
def test_what_cannot_be_sampled_is_a_usage_error(
    prompts: Any, settings: dict[str, Any], seed: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sample(tiny_model("llama"), prompts, Sampling(**{"max_new_tokens": 3, **settings}), seed=seed)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        sample(model, PROMPTS, Sampling(max_new_tokens=2))
