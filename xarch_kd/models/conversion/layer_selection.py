"""Selection of the blocks that keep their attention: `every 4`, `first 2`, `last 2`, a list."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xarch_kd.errors import UsageError

ALLOWED = 'a list of block indices, "every N", "every N from K", "first N", "last N", "none" or "all"'

_EVERY = re.compile(r"every\s+(\d+)(?:\s+from\s+(\d+))?")
_END = re.compile(r"(first|last)\s+(\d+)")


def kept_layers(
    count: int, *, keep_attention: str | Sequence[int] | None = None, replace: str | Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the sorted indices of the blocks, of `count`, that keep their attention.

    Exactly one of `keep_attention` and `replace` (its complement) is given. `every N` selects every Nth block, so the
    blocks N-1, 2N-1, …; `every N from K` selects K, K+N, …. Blocks count from 0. Raises `UsageError` for an index out
    of range, a repeated index, or words outside the list above.
    """
    if (keep_attention is None) == (replace is None):
        raise UsageError(
            "Exactly one of keep_attention and replace must be given.",
            asked=f"keep_attention={keep_attention!r}, replace={replace!r}",
            allowed=ALLOWED,
        )
    if keep_attention is not None:
        return _select("keep_attention", keep_attention, count)
    replaced = _select("replace", replace if replace is not None else (), count)
    return tuple(index for index in range(count) if index not in replaced)


def _select(name: str, selection: str | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(selection, str):
        return _select_words(name, selection, count)
    for index in selection:
        if isinstance(index, bool) or not isinstance(index, int):
            raise UsageError(f"{name} holds something that is not a block index.", asked=repr(index), allowed=ALLOWED)
        if not 0 <= index < count:
            raise UsageError(
                f"{name} names block {index}, but the model has {count} blocks.",
                asked=list(selection),
                allowed=f"0 to {count - 1}",
            )
    twice = sorted({index for index in selection if list(selection).count(index) > 1})
    if twice:
        raise UsageError(f"{name} has a block twice: {', '.join(map(str, twice))}.", asked=list(selection))
    return tuple(sorted(selection))


def _select_words(name: str, words: str, count: int) -> tuple[int, ...]:
    text = words.strip().lower()
    if text in ("none", "all"):
        return tuple(range(count)) if text == "all" else ()
    if (match := _EVERY.fullmatch(text)) is not None:
        step = int(match[1])
        start = step - 1 if match[2] is None else int(match[2])
        if step >= 1 and start < count:
            return tuple(range(start, count, step))
    elif (match := _END.fullmatch(text)) is not None:
        size = int(match[2])
        if size <= count:
            return tuple(range(size)) if match[1] == "first" else tuple(range(count - size, count))
    else:
        raise UsageError(f"{name} is not a selection of blocks.", asked=repr(words), allowed=ALLOWED)
    raise UsageError(f"{name} selects blocks that the model lacks.", asked=repr(words), found=f"{count} blocks")
