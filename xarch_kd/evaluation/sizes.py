"""Sizes of the suites that sample: how many prompts, tokens and rows each measurement has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, get_args

from xarch_kd.errors import check_table
from xarch_kd.mapping_file.schema import EvaluationSize


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of one evaluation.

    `prompts` prompts of `prompt_tokens` tokens are continued by `new_tokens` tokens; `unconditional` continuations
    start from one token. `swaps` are the shares of the new tokens after which prefixes are swapped. `probe_tokens` are
    the tokens of each task and length of `long_range`, at least two rows, of lengths that are `probe_shares` of the
    rows that were trained on.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    unconditional: int
    swaps: tuple[float, ...]
    probe_tokens: int
    probe_shares: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)

    def within(self, tokens: int) -> Size:
        """Return a size of at most `tokens` sampled tokens per model and condition, and of as many of a probe."""
        prompts = max(2, min(self.prompts, math.isqrt(tokens)))
        return replace(
            self,
            prompts=prompts,
            new_tokens=max(2, min(self.new_tokens, tokens // prompts)),
            unconditional=max(2, min(self.unconditional, prompts // 2)),
            probe_tokens=min(self.probe_tokens, tokens),
        )


SIZES: Final[dict[str, Size]] = {
    "quick": Size(
        prompts=24,
        prompt_tokens=32,
        new_tokens=32,
        unconditional=8,
        swaps=(0.5,),
        probe_tokens=512,
        probe_shares=(0.5, 1.0, 4.0),
    ),
    "standard": Size(
        prompts=256,
        prompt_tokens=32,
        new_tokens=128,
        unconditional=128,
        swaps=(0.25, 0.5, 0.75),
        probe_tokens=8192,
        probe_shares=(0.5, 1.0, 2.0, 4.0),
    ),
}

check_table("sizes of an evaluation", SIZES, get_args(EvaluationSize))
