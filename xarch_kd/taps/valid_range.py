"""From an attention mask to the valid range of each sequence, as a `Mixing` holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from xarch_kd.errors import TapError
from xarch_kd.ops import checks


def valid_range_of(attention_mask: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """Return start and stop of each sequence's valid tokens, [batch, 2] (int64), start <= t < stop; None without mask.

    `attention_mask` [batch, time] is non-zero at valid tokens, with padding at either end. A sequence of padding alone
    gets start = stop = 0. The result is on `device`, by default where the mask is.

    Raises TapError for a mask of another shape and for one with padding between tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise TapError(
            "A mixing matrix needs a mask with one value per token.",
            found=f"a mask of shape {list(attention_mask.shape)}",
            allowed="[batch, time], or none",
        )
    valid = attention_mask != 0
    number = valid.sum(1)
    start = valid.int().argmax(1)
    stop = torch.where(number > 0, valid.shape[1] - valid.flip(1).int().argmax(1), 0)
    with_holes = stop - start != number

    def error() -> TapError:
        sequence = int(with_holes.nonzero()[0])
        return TapError(
            "An attention mask has padding between tokens; a mixing matrix needs contiguous tokens in each sequence.",
            found=f"sequence {sequence} has {int(number[sequence])} valid tokens that are not contiguous",
            allowed="padding on the left, on the right, or on both sides",
            fix="move the padding of each sequence to its ends",
        )

    checks.require(~with_holes.any(), error)
    return torch.stack([start, stop], 1).to(device)
