"""Losses on relations between tokens, compared between student and teacher: no projector, any dimensions."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from xarch_kd.errors import UsageError
from xarch_kd.losses.blocks import block_rows, finite, paired, sum_of_blocks
from xarch_kd.losses.cka import standardized
from xarch_kd.losses.features import divisor
from xarch_kd.losses.standardize import Standardizer
from xarch_kd.ops import checks

# Score of a token that is not seen: exp of it is 0 and differences of two are finite.
UNSEEN: Final = -1e30
# Heads are split until they would be narrower than this.
RELATION_WIDTH: Final = 32


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    standardizer: Standardizer | None = None,
    shared_basis: bool = False,
) -> Tensor:
    """Return this micro-batch's share of the mean over tokens i of |k_i / |k_i| - t_i / |t_i||², a scalar.

    k_i are the products x_i·x_j with all tokens j of its sequence, t_i the teacher's (similarity-preserving
    distillation, Tung & Mori 2019, arXiv:1907.09682, within a sequence); student and teacher are [batch, time, dim],
    each of its own dimension. `normalizer` is the number of tokens of the whole step. A block of rows of the
    tokens × tokens products is in memory at a time.

    Invariant to a rotation and a scale of the student; not to a shift nor to scales of single tokens. Blinded by a
    massive dimension that both share, constant or not. `standardizer` and `shared_basis` cure it as in `cka_loss`.

    Raises:
        UsageError: tensors that do not fit.
        NonFiniteLoss: a feature of a valid token is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import gram_loss, token_count
    >>> student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 16)
    >>> gram_loss(student, teacher, normalizer=token_count(teacher)).shape
    torch.Size([])
    """
    checks.refuse_swapped_sides((student,), (teacher,))
    student, teacher = standardized(student, teacher, standardizer, shared_basis)
    own, target, valid_mask = paired(student, teacher, mask, "batch, time, dim")

    def part(leaf: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            expected = _directions(target, rows)
        return (_directions(leaf, rows) - expected).square().sum()

    batch, time = valid_mask.shape
    total = sum_of_blocks(own, time, block_rows(batch, 1, time, own.device), part)
    return finite(total / divisor(normalizer, total), "gram")


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    heads: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Return this micro-batch's share of the mean over tokens and relation heads of KL(teacher's row ‖ student's row).

    The queries, or keys, or values of a layer [batch, time, heads, dim], of either model, are put side by side and
    split into `heads` relation heads (None: `relation_heads`), so that head counts need not agree; a row is
    softmax over the tokens j that i sees of x_i·x_j / √(dim of a relation head) (MiniLMv2, arXiv:2012.15828).
    `causal` is for decoders; a sequence's first row is then 0. `normalizer` is the number of tokens of the whole step.
    A block of rows of the relations is in memory at a time.

    Invariant to a rotation inside each relation head, and to nothing else: scales change how sharp a relation is.
    Blinded by a massive dimension that both share: rows then look at one token. Relations of rotated (RoPE) queries and
    keys depend on positions in a way that a mixer without positions can only imitate; take them before the rotation, or
    the values.

    Raises:
        UsageError: tensors that do not fit, or a number of heads that does not divide both dimensions.
        NonFiniteLoss: a feature of a valid token is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import relation_loss, token_count
    >>> teacher = torch.randn(2, 4, 2, 8)
    >>> abs(float(relation_loss(teacher, teacher, normalizer=token_count(teacher)))) < 1e-3
    True
    """
    checks.refuse_swapped_sides((student,), (teacher,))
    own, target, valid_mask = paired(student, teacher, mask, "batch, time, heads, dim")
    own, target = own.flatten(2), target.flatten(2)
    heads = relation_heads(own.shape[-1], target.shape[-1], heads)
    own, target = (features.unflatten(2, (heads, -1)).transpose(1, 2) for features in (own, target))
    batch, time = valid_mask.shape

    def part(leaf: Tensor, rows: slice) -> Tensor:
        columns = slice(0, rows.stop if causal else time)
        hidden = ~valid_mask[:, None, None, columns]
        if causal:
            position = torch.arange(columns.stop, device=valid_mask.device)
            hidden = hidden | (position > position[rows, None])
        found = _log_relations(leaf, rows, columns, hidden)
        with torch.no_grad():
            expected = _log_relations(target, rows, columns, hidden)
        return (expected.exp() * (expected - found)).sum()

    total = sum_of_blocks(own, time, block_rows(batch, heads, time, own.device), part)
    return finite(total / divisor(normalizer, total) / heads, "relation")


def relation_heads(student_dim: int, teacher_dim: int, wanted: int | None = None) -> int:
    """Return into how many relation heads two dimensions (of all heads together) are split.

    By default as many as leave both at least 32 numbers per head, or 1.

    Raises:
        UsageError: `wanted` does not divide both.

    >>> from xarch_kd.losses import relation_heads
    >>> relation_heads(64, 96)
    2
    """
    shared = math.gcd(student_dim, teacher_dim)
    possible = [count for count in range(1, shared + 1) if shared % count == 0]
    if wanted is not None:
        if wanted not in possible:
            raise UsageError(
                "Relation heads must divide the dimensions of student and teacher.",
                asked=wanted,
                found=f"student {student_dim}, teacher {teacher_dim}",
                allowed=" | ".join(map(str, possible)),
            )
        return wanted
    narrow = min(student_dim, teacher_dim)
    return max((count for count in possible if narrow // count >= RELATION_WIDTH), default=1)


def _directions(features: Tensor, rows: slice) -> Tensor:
    """Return the rows' products with all tokens [batch, rows, time], each row with length 1, or 0 if it is 0."""
    products = features[:, rows] @ features.transpose(1, 2)
    return functional.normalize(products, dim=-1, eps=torch.finfo(features.dtype).tiny)


def _log_relations(features: Tensor, rows: slice, columns: slice, hidden: Tensor) -> Tensor:
    """Return the logarithm of the rows of softmax [batch, heads, rows, columns]."""
    scores = features[:, :, rows] @ features[:, :, columns].transpose(-1, -2) / features.shape[-1] ** 0.5
    return torch.log_softmax(scores.masked_fill(hidden, UNSEEN), -1)
