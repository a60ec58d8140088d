"""The tokens of each sequence that an attention mask counts, as the span that a `Mixing` holds."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.errors import TapError
from xarch_kd.ops import checks


def span_of(attention_mask: Tensor | None, device: torch.device | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Return start and stop [batch] (int64), such that start <= t < stop are the tokens that count; None without mask.

    `attention_mask` [batch, time] is non-zero where a token counts, with padding at either end. A sequence of padding
    alone gets start = stop = 0. Both are on `device`, or where the mask is.

    Raises TapError for a mask of another shape and for one with padding between tokens.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 2:
        raise TapError(
            "A mixing matrix needs a mask with one value per token.",
            found=f"a mask of shape {list(attention_mask.shape)}",
            allowed="[batch, time], or none",
        )
    counted = attention_mask != 0
    number = counted.sum(1)
    start = counted.int().argmax(1)
    stop = torch.where(number > 0, counted.shape[1] - counted.flip(1).int().argmax(1), 0)
    with_holes = stop - start != number

    def error() -> TapError:
        sequence = int(with_holes.nonzero()[0])
        return TapError(
            "An attention mask has padding between tokens; a mixing matrix is read of one run of tokens per sequence.",
            found=f"sequence {sequence} counts {int(number[sequence])} tokens that are not one run",
            allowed="padding on the left, on the right, or on both sides",
            fix="move the padding of each sequence to its ends",
        )

    checks.require(~with_holes.any(), error)
    return start.to(device), stop.to(device)
