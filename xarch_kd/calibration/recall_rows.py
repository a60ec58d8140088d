"""Rows of random tokens that test recall, without a tokenizer: copying, and lists of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from xarch_kd.errors import UsageError

# Tokens of a copied string, and of the text between it and its copy, in rows of full length.
COPIED: Final = 48
FILLER: Final = 16
SHORTEST: Final = 16
# Ids of a key and of a value.
KEY, VALUE = 2, 2


@dataclass(frozen=True, kw_only=True)
class RecallRows:
    """Rows of tokens, some of which follow from earlier ones of their row.

    `input_ids` [rows, time]; `copies` and `values` [rows, time] are true where the next token repeats an earlier
    string, or is the value of a key that was listed before.
    """

    input_ids: Tensor
    copies: Tensor
    values: Tensor


def recall_rows(
    tokens: Sequence[int] | Tensor, filler: Tensor, *, copying: int, lists: int, longest: int | None, seed: int
) -> RecallRows:
    """Return `copying` rows [48 random tokens | filler | the same 48] and `lists` rows of keys and values.

    `tokens` are the ids to draw from, `filler` ids of ordinary text, at least 16. A list has as many pairs of two key
    tokens and two value tokens as fit, and then all pairs again in another order. Rows are shorter for a model of at
    most `longest` positions or of few tokens. Raises UsageError where they would be too short.
    """
    length = 2 * COPIED + FILLER
    length = min(length, length if longest is None else longest, len(tokens)) // 8 * 8
    if length < SHORTEST or filler.numel() < FILLER:
        raise UsageError(
            "Recall cannot be measured with this model and text.",
            found=f"{longest} positions, {len(tokens)} tokens to draw from, {filler.numel()} tokens of text",
            allowed=f"at least {SHORTEST} of each",
        )
    generator = torch.Generator().manual_seed(seed)
    known = torch.as_tensor(tokens)
    gap = length // 7
    span = (length - gap) // 2
    between = filler.flatten()[: length - 2 * span]
    rows, copies, values = [], [], []
    for _ in range(copying):
        string = known[torch.randperm(len(known), generator=generator)[:span]]
        rows.append(torch.cat([string, between, string]))
        # The first token of the copy does not follow from anything.
        copies.append(_marked(length, range(length - span, length - 1)))
        values.append(_marked(length, ()))
    pairs = length // (2 * (KEY + VALUE))
    for _ in range(lists):
        drawn = known[torch.randperm(len(known), generator=generator)[: pairs * (KEY + VALUE)]].view(pairs, -1)
        again = drawn[torch.randperm(pairs, generator=generator)]
        rows.append(torch.cat([drawn.flatten(), again.flatten()]))
        starts = range(length // 2, length, KEY + VALUE)
        copies.append(_marked(length, ()))
        values.append(_marked(length, [start + KEY - 1 + offset for start in starts for offset in range(VALUE)]))
    return RecallRows(input_ids=torch.stack(rows), copies=torch.stack(copies), values=torch.stack(values))


def _marked(length: int, places: Sequence[int]) -> Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(places)] = True
    return mask
