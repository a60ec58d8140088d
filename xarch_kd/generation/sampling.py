"""Batched sampling from a causal language model, on `transformers`' own `generate`.

Every prompt has its own random numbers, so its samples do not depend on the prompts beside it. Prompts of unequal
length are padded on the left only in models that ignore such padding exactly (`ignores_left_padding`); otherwise each
length is a batch of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xarch_kd.errors import ModelError, TapError, UsageError
from xarch_kd.taps.layout import layout_of

# Model types without attention whose own cache works; a hybrid class without attention raises with one.
ATTENTION_FREE = ("falcon_mamba", "mamba", "mamba2")
# Model types that hold their states in modules, where a prompt of one token continues the previous call's states.
STATES_IN_MODULES = ("recurrent_gemma",)
# Recurrent mixers that a masked token leaves untouched if their projections have no bias: with one, the causal
# convolution carries the bias of masked tokens into the next ones. Other recurrences are updated by masked tokens.
MASKABLE = ("gated_delta", "kda", "short_convolution")
# Below 1 by more than float64 rounds, so that a share of the total probability is always below the total.
LARGEST_SHARE = 1 - 2.0**-32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Decoding settings: greedy at temperature 0, else sampling from the tempered distribution, truncated.

    `top_k` keeps the k most likely tokens, then `top_p` the most likely ones that together have this probability, then
    `min_p` those with at least this share of the most likely one's probability; None, 1 and 0 keep all. Raises
    UsageError for a setting out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, holds, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or above, finite"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or None for all tokens"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not holds:
                raise UsageError(f"Sampling cannot use {name} {value}.", asked=f"{name}: {value}", allowed=allowed)

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is taken each time."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Prompts with their sampled tokens, one per row in the order of the prompts, padded on the right.

    `input_ids` [batch, time] int64 holds the prompt and the tokens after it. `attention_mask` [batch, time] is True at
    both, `sampled` [batch, time] at the sampled tokens alone, an end-of-sequence token included. `ended` [batch] is
    True for rows with an end-of-sequence token. In nats, and 0 wherever `sampled` is False: `log_probs` [batch, time]
    (float32) of each sampled token under the model's own distribution, and `sampling_log_probs` under the one that it
    was drawn from (tempered, truncated and renormalized; 0 if greedy).
    """

    input_ids: Tensor
    attention_mask: Tensor
    sampled: Tensor
    ended: Tensor
    log_probs: Tensor
    sampling_log_probs: Tensor

    def completions(self) -> list[list[int]]:
        """Return the sampled token ids of each row, with its end-of-sequence token."""
        return [ids[mask].tolist() for ids, mask in zip(self.input_ids, self.sampled, strict=True)]


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    end_of_sequence: Sequence[int] | None = None,
    vocabulary: int | None = None,
) -> Samples:
    """Sample a continuation of each prompt (token ids) and return all of them, on the model's device.

    A prompt's samples follow from its tokens, its seed and the settings; the prompts beside it change its logits by
    rounding at most. `seed` is one for all prompts or one per prompt: equal prompts with equal seeds have equal
    samples. A row ends with a token of `end_of_sequence`, by default those of the model's generation config; other
    settings of that config, a repetition penalty for example, do not apply. At most `batch_size` rows run at once. Only
    the first `vocabulary` tokens are sampled, by default all. The model runs in eval mode without gradients and is left
    as it was found, as is torch's random state.

    Raises UsageError for no prompt or an empty one, token ids outside the vocabulary, more tokens than the model has
    positions, and another number of seeds than of prompts; ModelError for logits that are not finite.

    >>> from xarch_kd.testing.tiny import tiny_model
    >>> model = tiny_model("llama")
    >>> samples = sample(model, [[5, 6, 7], [8]], Sampling(max_new_tokens=4, temperature=0.7), end_of_sequence=[])
    >>> samples.input_ids.shape, samples.sampled.sum(1).tolist()
    (torch.Size([2, 7]), [4, 4])
    """
    rows = [torch.as_tensor(prompt, dtype=torch.long).cpu() for prompt in prompts]
    _check_prompts(model, rows, sampling)
    seeds = [seed] * len(rows) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(rows):
        raise UsageError("Each prompt needs one seed.", asked=f"{len(seeds)} seeds", found=f"{len(rows)} prompts")
    ends = end_tokens(model) if end_of_sequence is None else list(end_of_sequence)
    found: dict[int, _Row] = {}
    with _eval_mode(model):
        for group in _groups([len(row) for row in rows], ignores_left_padding(model), batch_size):
            shares = [_shares(rows[index], seeds[index], sampling) for index in group]
            draw = _Draw(sampling, torch.stack(shares).to(model.device), vocabulary)
            written = _generate(model, [rows[index] for index in group], draw, ends)
            found.update(zip(group, written, strict=True))
    return _assemble(rows, [found[index] for index in range(len(rows))], ends)


def ignores_left_padding(model: PreTrainedModel) -> bool:
    """Return True if padding on the left changes nothing at a model's tokens: attention, or maskable recurrences."""
    try:
        layout = layout_of(model)
    except TapError:
        return False
    return all(
        kind == "attention" or (kind in MASKABLE and not _projects_with_bias(mixer))
        for mixer, kind in zip(layout.mixers, layout.mixer_kinds, strict=True)
    )


def can_use_cache(model: PreTrainedModel) -> bool:
    """Return True if the stock class decodes with its cache as it does without.

    A hybrid class needs at least one attention layer for it, and Mamba-2 classes do not apply a `time_step_limit` to
    the tokens that they decode one by one.
    """
    if model.config.model_type in STATES_IN_MODULES:
        return False
    limits: list[Any] = [module.time_step_limit for module in model.modules() if hasattr(module, "time_step_limit")]
    if any(low > 0 or high < math.inf for low, high in limits):
        return False
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None or model.config.model_type in ATTENTION_FREE:
        return True
    return any(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)


class _Row(NamedTuple):
    """Sampled tokens of one prompt and both of their log-probabilities, each [tokens]."""

    tokens: Tensor
    log_probs: Tensor
    sampling_log_probs: Tensor


class _Draw(LogitsProcessor):
    """A processor that draws the next token of each row by the row's own random number and leaves no other token.

    `generate` decodes greedily with it, so torch's generator, which all rows would share, is never used.
    """

    def __init__(self, sampling: Sampling, shares: Tensor, vocabulary: int | None) -> None:
        self.sampling = sampling
        self.shares = shares
        self.vocabulary = vocabulary
        self.log_probs: list[Tensor] = []
        self.sampling_log_probs: list[Tensor] = []
        self.warpers = LogitsProcessorList()
        if not sampling.is_greedy:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p > 0:
            self.warpers.append(MinPLogitsWarper(float(sampling.min_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]  # LongTensor
        full, scores = scores, scores[:, : self.vocabulary]
        own = scores.float().log_softmax(-1)
        if self.sampling.is_greedy:
            token = own.argmax(-1, keepdim=True)
            drawn_from = torch.zeros_like(token, dtype=torch.float32)
        else:
            warped = self.warpers(input_ids, scores.float()).log_softmax(-1)  # type: ignore[arg-type]
            # Inverse of the cumulative distribution: the first token at which it exceeds the row's share of its total.
            total = warped.double().exp().cumsum(-1)
            share = self.shares[:, len(self.log_probs), None] * total[:, -1:]
            token = torch.searchsorted(total, share, right=True).clamp(max=total.shape[-1] - 1)
            drawn_from = warped.gather(-1, token)
        self.log_probs.append(own.gather(-1, token)[:, 0])
        self.sampling_log_probs.append(drawn_from[:, 0])
        return torch.full_like(full, -math.inf).scatter_(-1, token, 0.0)


def _generate(model: PreTrainedModel, prompts: Sequence[Tensor], draw: _Draw, ends: list[int]) -> list[_Row]:
    """Continue prompts, padded on the left to one length, and return each one's tokens up to its end."""
    width = max(len(prompt) for prompt in prompts)
    padding = ends[0] if ends else 0
    ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0), value=padding) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        max_new_tokens=draw.sampling.max_new_tokens,
        do_sample=False,
        use_cache=can_use_cache(model),
        eos_token_id=ends or None,
        pad_token_id=padding,
    )
    with _own_settings_only(model):
        output: Any = model.generate(  # type: ignore[operator]  # from a mixin that the types do not show
            ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
        )
    tokens = output[:, width:]
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=torch.long, device=tokens.device))
    counts = ((is_end.cumsum(1) - is_end.long()) == 0).sum(1).tolist()
    log_probs, drawn_from = torch.stack(draw.log_probs, 1), torch.stack(draw.sampling_log_probs, 1)
    return [
        _Row(tokens[row, :count], log_probs[row, :count], drawn_from[row, :count]) for row, count in enumerate(counts)
    ]


def _assemble(prompts: Sequence[Tensor], found: Sequence[_Row], ends: list[int]) -> Samples:
    device = found[0].tokens.device
    time = max(len(prompt) + len(row.tokens) for prompt, row in zip(prompts, found, strict=True))
    shape = (len(prompts), time)
    ids = torch.full(shape, ends[0] if ends else 0, dtype=torch.long, device=device)
    mask, sampled = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    log_probs, drawn_from = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
    for index, (prompt, row) in enumerate(zip(prompts, found, strict=True)):
        start, stop = len(prompt), len(prompt) + len(row.tokens)
        ids[index, :start], ids[index, start:stop] = prompt.to(device), row.tokens
        mask[index, :stop], sampled[index, start:stop] = True, True
        log_probs[index, start:stop], drawn_from[index, start:stop] = row.log_probs, row.sampling_log_probs
    if not (log_probs.isfinite().all() and drawn_from.isfinite().all()):
        raise ModelError(
            "The model's logits are not finite, so there is no distribution to sample from.",
            fix="check the model's weights, and its dtype: float16 may overflow where bfloat16 does not",
        )
    is_end = torch.isin(ids, torch.tensor(ends, dtype=torch.long, device=device)) & sampled
    return Samples(
        input_ids=ids,
        attention_mask=mask,
        sampled=sampled,
        ended=is_end.any(1),
        log_probs=log_probs,
        sampling_log_probs=drawn_from,
    )


def _groups(lengths: Sequence[int], is_padded: bool, batch_size: int | None) -> Iterator[list[int]]:
    """Yield the indices of prompts that run together: of similar length, and of equal length unless `is_padded`."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        is_full = batch_size is not None and len(group) >= batch_size
        if group and (is_full or (not is_padded and lengths[index] != lengths[group[0]])):
            yield group
            group = []
        group.append(index)
    yield group


def _shares(prompt: Tensor, seed: int, sampling: Sampling) -> Tensor:
    """Return a prompt's random numbers in [0, 1), one per new token [max_new_tokens], float64 on the CPU."""
    key = hashlib.sha256(f"{seed}:{prompt.tolist()}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    drawn = torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
    return drawn.clamp(max=LARGEST_SHARE)


def _check_prompts(model: PreTrainedModel, prompts: Sequence[Tensor], sampling: Sampling) -> None:
    if not prompts:
        raise UsageError("There is no prompt to continue.", fix="give at least one list of token ids")
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or len(prompt) == 0:
            raise UsageError(
                f"Prompt {index} holds no token.",
                found=f"shape {list(prompt.shape)}",
                fix="begin it with a token, e.g. the tokenizer's bos_token_id",
            )
        if prompt.min() < 0 or prompt.max() >= vocabulary:
            raise UsageError(
                f"Prompt {index} holds token ids outside the model's vocabulary.",
                found=f"ids from {int(prompt.min())} to {int(prompt.max())}",
                allowed=f"0 to {vocabulary - 1}",
                fix="use the model's own tokenizer",
            )
        if positions is not None and len(prompt) + sampling.max_new_tokens > positions:
            raise UsageError(
                f"Prompt {index} and the new tokens do not fit into the model's context.",
                asked=f"{len(prompt)} tokens and {sampling.max_new_tokens} new ones",
                allowed=f"{positions} in all (max_position_embeddings)",
                fix="shorten the prompt or lower max_new_tokens",
            )


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the end-of-sequence ids of the model's generation config."""
    settings = model.generation_config
    given = None if settings is None else settings.eos_token_id
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def _projects_with_bias(mixer: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) and module.bias is not None for module in mixer.modules())


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and those that trained back afterwards."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def _own_settings_only(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation config: `generate` would fill our settings' open fields from it."""
    hidden, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = hidden
