"""Mixing matrices and their distances reimplemented in float64, for the tests of `mixing_distance`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from xarch_kd.mixing import (
    BandedMixing,
    DeltaMixing,
    LinearMixing,
    Mixing,
    SelectiveMixing,
    SoftmaxMixing,
    SSDMixing,
)
from xarch_kd.ops import mixing_distance

BATCH, TIME, EPSILON = 3, 11, 1e-3
# Blocks of 4 rows or columns: 11 tokens end with a block that is not full.
CHUNK = 4
ROW_DISTANCES = ("frobenius", "relative_frobenius", "cosine")
DISTANCES = ("kl", "cross_entropy", *ROW_DISTANCES)
Factors = dict[str, Tensor]
WHOLE = torch.tensor([[0, TIME]] * BATCH)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(window: int | None = None, causal: bool = True, valid_range: Tensor | None = None):
    """Return the mask of columns visible to a row, bool [batch, 1, time, time]."""
    i, j = torch.arange(TIME)[:, None], torch.arange(TIME)[None]
    seen = (j <= i) if causal else torch.ones(TIME, TIME, dtype=torch.bool)
    if window is not None:
        seen = seen & (i - j < window)
    first, last = (WHOLE if valid_range is None else valid_range).unbind(1)
    for position in (i, j):
        inside = (position >= first[:, None, None]) & (position < last[:, None, None])
        seen = seen & inside
    return seen[:, None]


def softmax_logits(factors: Factors, *, scale: float, softcap: float | None = None) -> Tensor:
    query, key = factors["query"], factors["key"]
    z = torch.einsum("bihd,bjhd->bhij", query, key.repeat_interleave(query.shape[2] // key.shape[2], 2)) * scale
    return z if softcap is None else softcap * (z / softcap).tanh()


def softmax_log(factors: Factors, **options: Any) -> Tensor:
    """Return log M [batch, heads, time, time], -inf where M is 0."""
    cut = {name: options.pop(name, None) for name in ("window", "valid_range")}
    seen = visible(causal=options.pop("causal", True), **cut)
    z = softmax_logits(factors, **options).masked_fill(~seen, -torch.inf)
    parts = [z.masked_fill(~seen.any(-1, keepdim=True), 0)]
    if "sinks" in factors:
        parts.append(factors["sinks"][None, :, None, None].expand(*z.shape[:3], 1))
    return (z - torch.logsumexp(torch.cat(parts, -1), -1, keepdim=True)).masked_fill(~seen, -torch.inf)


def softmax_matrix(factors: Factors, **options: Any) -> Tensor:
    return softmax_log(factors, **options).exp()


def ssd_matrix(factors: Factors, valid_range: Tensor | None = None) -> Tensor:
    heads, groups = factors["dt"].shape[2], factors["C"].shape[2]
    left, right = (factors[name].repeat_interleave(heads // groups, 2) for name in ("C", "B"))
    rows = []
    decay = factors["log_decay"]
    for i in range(TIME):
        entries = []
        for j in range(TIME):
            if j > i:
                entries.append(torch.zeros(BATCH, heads, dtype=torch.float64))
                continue
            between = decay[:, j + 1 : i + 1].sum(1).exp()
            entry = between * (left[:, i] * right[:, j]).sum(-1) * factors["dt"][:, j]
            entries.append(entry + factors["D"] if i == j and "D" in factors else entry)
        rows.append(torch.stack(entries, -1))
    return torch.stack(rows, 2).masked_fill(~visible(valid_range=valid_range), 0)


def make_softmax(seed: int, heads: int, key_heads: int, width: int, sinks: bool = False) -> Factors:
    factors = {"query": normal(seed, BATCH, TIME, heads, width), "key": normal(seed + 1, BATCH, TIME, key_heads, width)}
    return {**factors, "sinks": normal(seed + 2, heads)} if sinks else factors


def make_ssd(seed: int, heads: int, groups: int, strength: float = 0.3, skip: bool = True) -> Factors:
    factors = {
        "C": normal(seed, BATCH, TIME, groups, 5),
        "B": normal(seed + 1, BATCH, TIME, groups, 5),
        "log_decay": -strength * normal(seed + 2, BATCH, TIME, heads).abs(),
        "dt": normal(seed + 3, BATCH, TIME, heads).abs(),
    }
    return {**factors, "D": normal(seed + 4, heads)} if skip else factors


def built(kind: type[Mixing], factors: Factors, dtype: torch.dtype, grad: bool, **options: Any) -> Mixing:
    return kind(**{name: f.detach().to(dtype).clone().requires_grad_(grad) for name, f in factors.items()}, **options)


def formula(distance: Any, target: Tensor, matrix: Tensor, log_matrix: Tensor | None) -> Tensor:
    """Return rows [batch, heads, time] from whole matrices."""
    if log_matrix is not None:
        finite = log_matrix.masked_fill(target == 0, 0)
        cross = -(target * finite).sum(-1)
        return cross + torch.special.xlogy(target, target).sum(-1) if distance == "kl" else cross
    squared = ((target - matrix) ** 2).sum(-1)
    if distance == "frobenius":
        return squared
    if distance == "relative_frobenius":
        return squared / (target.pow(2).sum(-1) + EPSILON)
    lengths = (target.pow(2).sum(-1) + EPSILON).sqrt() * (matrix.pow(2).sum(-1) + EPSILON).sqrt()
    return 1 - (target * matrix).sum(-1) / lengths


def reduced(rows: Tensor, keep: Tensor, reduction: str) -> Tensor:
    rows = rows.transpose(1, 2).masked_fill(~keep[:, :, None], 0)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (keep.sum() * rows.shape[2])


def head_weights(student: int, teacher: int) -> Tensor:
    weights = normal(99, student, teacher).abs()
    weights[0, 1] = 0
    return weights / weights.sum(1, keepdim=True)


PADDED = {"valid_range": torch.tensor([[0, TIME], [2, TIME - 3], [5, 6]])}
RIGHT_PADDED = {"valid_range": torch.tensor([[0, TIME], [0, TIME - 3], [0, 6]])}
# name -> heads, key heads, sinks of the teacher; heads, key heads, sinks of the student; options of each.
SOFTMAX_PAIRS: dict[str, tuple[tuple[int, int, bool], tuple[int, int, bool], dict[str, Any], dict[str, Any]]] = {
    "plain": ((2, 2, False), (2, 2, False), {}, {}),
    "grouped heads": ((6, 3, False), (4, 2, False), {}, {}),
    "padded": ((6, 2, False), (4, 1, False), PADDED, PADDED),
    "padded alike": ((4, 4, False), (4, 2, False), PADDED, PADDED),
    "windows": ((4, 2, False), (4, 4, False), {"window": 3}, {"window": 5}),
    "teacher's window": ((4, 2, False), (4, 4, False), {"window": 3}, {}),
    "softcap": ((2, 1, False), (4, 2, False), {"softcap": 1.5}, {"softcap": 0.8}),
    "student's sinks": ((2, 2, False), (2, 1, True), {}, {}),
    "not causal": (
        (2, 2, False),
        (2, 2, False),
        {"causal": False, "window": 4},
        {"causal": False, **RIGHT_PADDED},
    ),
}


def softmax_pair(name: str, dtype: torch.dtype) -> tuple[Mixing, Mixing, Tensor | None]:
    (heads, keys, sinks), (student_heads, student_keys, student_sinks), options, student_options = SOFTMAX_PAIRS[name]
    if name == "not causal":
        options = {**options, **RIGHT_PADDED}
    teacher = built(SoftmaxMixing, make_softmax(0, heads, keys, 5, sinks), dtype, True, scale=0.7, **options)
    factors = make_softmax(10, student_heads, student_keys, 3, student_sinks)
    student = built(SoftmaxMixing, factors, dtype, True, scale=1.1, **student_options)
    return teacher, student, None if heads == student_heads else head_weights(student_heads, heads).to(dtype)


# name -> what the teacher is, heads of the teacher, heads and groups of the student, strength of its decay, padded.
SSD_PAIRS: dict[str, tuple[type[Mixing], int, int, int, float, bool]] = {
    "one group": (SoftmaxMixing, 4, 4, 1, 0.3, False),
    "two groups": (SoftmaxMixing, 6, 4, 2, 0.3, False),
    "a group a head": (SoftmaxMixing, 3, 3, 3, 0.3, False),
    "padded": (SoftmaxMixing, 6, 4, 2, 0.3, True),
    "strong decay": (SoftmaxMixing, 4, 4, 2, 200.0, False),
    "no decay": (SoftmaxMixing, 2, 2, 1, 0.0, False),
    "of two state spaces": (SSDMixing, 6, 4, 2, 0.3, False),
    "of two state spaces, padded": (SSDMixing, 4, 4, 1, 3.0, True),
}


def ssd_pair(name: str, dtype: torch.dtype) -> tuple[Mixing, Mixing, Tensor | None]:
    kind, heads, student_heads, groups, strength, padded = SSD_PAIRS[name]
    options: dict[str, Any] = PADDED if padded else {}
    if kind is SoftmaxMixing:
        teacher = built(kind, make_softmax(0, heads, 1, 5), dtype, True, scale=0.7, **options)
    else:
        teacher = built(kind, make_ssd(0, heads, heads, 0.5), dtype, True)
    factors = make_ssd(10, student_heads, groups, strength, skip=groups == 2)
    student = built(SSDMixing, factors, dtype, True, **options)
    return teacher, student, None if heads == student_heads else head_weights(student_heads, heads).to(dtype)


def other_student(name: str, dtype: torch.dtype) -> Mixing:
    """Return a student of a family whose matrix is not written out here, of 3 heads."""
    query, key = normal(20, BATCH, TIME, 3, 5), normal(21, BATCH, TIME, 3, 5)
    decay = -normal(22, BATCH, TIME, 3, 5).abs()
    if name == "linear":
        return built(LinearMixing, {"query": query, "key": key[:, :, :1]}, dtype, True, scale=0.4, **PADDED)
    if name == "linear, normalised":
        factors = {"query": query.abs(), "key": key.abs(), "log_decay": decay[..., 0]}
        return built(LinearMixing, factors, dtype, True, normalized=True)
    if name == "gated linear":
        return built(LinearMixing, {"query": query, "key": key, "log_decay": decay}, dtype, True)
    if name == "banded":
        factors = {"taps": normal(23, 3, 4), "row_scale": query[..., 0], "column_scale": key[..., 0]}
        return built(BandedMixing, factors, dtype, True, **PADDED)
    if name == "selective":
        factors = {
            "C": normal(24, BATCH, TIME, 5),
            "B": normal(25, BATCH, TIME, 5),
            "dt": query[..., 0].abs(),
            "A": -normal(26, 3, 5).abs(),
            "D": normal(27, 3),
        }
        return built(SelectiveMixing, factors, dtype, True)
    key = key / key.norm(dim=-1, keepdim=True)
    factors = {"query": query, "key": key, "beta": query[..., 1].sigmoid(), "log_decay": 0.2 * decay[..., 0]}
    return built(DeltaMixing, factors, dtype, True, **PADDED)


def dense(mixing: Mixing) -> tuple[Tensor, Tensor | None, Factors]:
    """Return the matrix, its logarithm if it is a softmax, and the float64 leaves that both are made of."""
    leaves = {name: factor.detach().double().requires_grad_() for name, factor in mixing.factors.items()}
    if isinstance(mixing, SoftmaxMixing):
        options = {name: getattr(mixing, name) for name in ("scale", "causal", "window", "softcap", "valid_range")}
        log = softmax_log(leaves, **options)
        return log.exp(), log, leaves
    if isinstance(mixing, SSDMixing):
        return ssd_matrix(leaves, mixing.valid_range), None, leaves
    # Matrices of the other families have tests of their own.
    return dataclasses.replace(mixing, **leaves).dense(), None, leaves


def compare(
    teacher: Mixing,
    student: Mixing,
    head_map: Tensor | None,
    distance: Any,
    impl: str,
    *,
    reduction: str = "mean",
    mask: Tensor | None = None,
    values: float = 1e-12,
    gradients: float = 1e-10,
) -> None:
    """Check value and gradients of one call against the formula; tolerances are relative to the largest number."""
    found = mixing_distance(
        student,
        teacher,
        distance=distance,
        head_map=head_map,
        mask=mask,
        reduction=reduction,
        epsilon=EPSILON,
        impl=impl,
        chunk_size=CHUNK,
    )
    assert found.standard_error is None
    matrix, _, _ = dense(teacher)
    target = matrix.detach() if head_map is None else torch.einsum("st,btij->bsij", head_map.double(), matrix.detach())
    entries, log, leaves = dense(student)
    rows = formula(distance, target, entries, log if distance in ("kl", "cross_entropy") else None)
    keep = teacher.valid_mask() & student.valid_mask() & (True if mask is None else mask)
    expected = reduced(rows, keep, reduction)
    upstream = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    assert found.total.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    close(found.total.detach(), expected.detach(), values, "value")
    if reduction == "none":
        assert (found.total[~keep] == 0).all()
    (found.total * upstream.to(found.total.dtype)).sum().backward()
    (expected * upstream).sum().backward()
    for name, factor in student.factors.items():
        assert factor.grad is not None and factor.grad.dtype == factor.dtype
        close(factor.grad, leaves[name].grad, gradients, name)
    assert all(factor.grad is None for factor in teacher.factors.values())


def close(found: Tensor, expected: Tensor | None, tolerance: float, what: str) -> None:
    assert expected is not None
    assert found.shape == expected.shape, what
    scale = max(float(expected.abs().max()), 1e-3)
    assert float((found.double() - expected).abs().max()) <= tolerance * scale, what


def some_mask() -> Tensor:
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 0] = mask[0, 7] = mask[1, -4:] = False
    return mask
