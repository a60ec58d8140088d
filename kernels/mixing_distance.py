"""Custom operators of torch for `mixing_distance`: rows of two maps compared tile by tile, with gradients.

Loading this file registers `torch.ops.xarch_kd.softmax_divergence`, `softmax_statistics` and `ssd_statistics`, and the
operators of their backward passes. Each takes a pair of maps as the fields of `mixing_softmax.Pair`: student and
teacher query and key [batch, time, heads, width], valid_range [batch, 4] (int32), head_map [student heads, teacher
heads] or None, and scales, caps (0: none), causal and windows (0: none) of student and teacher. Values of rows are
[batch, heads, time] in float32. Only the student receives gradients, and they cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xarch_kd.kernels import mixing_ssd
from xarch_kd.kernels.mixing_maps import saved_dtype
from xarch_kd.kernels.mixing_softmax import Pair, compare_columns, compare_rows
from xarch_kd.kernels.mixing_ssd import SSDPair

# Number of an operator's first arguments, which are the fields of its pair, and of the tensors among them.
PAIR = len(Pair._fields)
TENSORS = Pair._fields.index("scales")
SSD_TENSORS = SSDPair._fields.index("scale")


@torch.library.custom_op("xarch_kd::softmax_divergence", mutates_args=())
def softmax_divergence(
    query: torch.Tensor,
    key: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    valid_range: torch.Tensor,
    head_map: torch.Tensor | None,
    scales: Sequence[float],
    caps: Sequence[float],
    causal: Sequence[bool],
    windows: Sequence[int],
    kind: str,
    slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the divergence of each row, the query's gradient for an upstream of 1, and both log-sum-exps.

    kind is "kl" or "cross_entropy"; the query's gradient is empty unless `slopes`.
    """
    pair = Pair(query, key, teacher_query, teacher_key, valid_range, head_map, scales, caps, causal, windows).packed()
    lses = pair.log_sum_exps()
    return *compare_rows(pair, lses, kind, None, (True, slopes)), *lses


@torch.library.custom_op("xarch_kd::softmax_statistics", mutates_args=())
def softmax_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    valid_range: torch.Tensor,
    head_map: torch.Tensor | None,
    scales: Sequence[float],
    caps: Sequence[float],
    causal: Sequence[bool],
    windows: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Σ P̄², Σ P̄ S, Σ S² of each row [3, batch, heads, time], and both log-sum-exps."""
    pair = Pair(query, key, teacher_query, teacher_key, valid_range, head_map, scales, caps, causal, windows).packed()
    lses = pair.log_sum_exps()
    return compare_rows(pair, lses, "statistics", None, (True, False))[0], *lses


@torch.library.custom_op("xarch_kd::softmax_gradients", mutates_args=())
def softmax_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    valid_range: torch.Tensor,
    head_map: torch.Tensor | None,
    scales: Sequence[float],
    caps: Sequence[float],
    causal: Sequence[bool],
    windows: Sequence[int],
    kind: str,
    lse: torch.Tensor,
    teacher_lse: torch.Tensor,
    upstream: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of query and key, each empty unless `wanted`.

    upstream is one number per row for "kl" and "cross_entropy", and a, b, a pm + b mm for "statistics".
    """
    pair = Pair(query, key, teacher_query, teacher_key, valid_range, head_map, scales, caps, causal, windows).packed()
    lses, upstream = (lse, teacher_lse), upstream.contiguous()
    of_query, of_key = query.new_empty(0), key.new_empty(0)
    if wanted[0]:
        of_query = compare_rows(pair, lses, kind, upstream, (False, True))[1].to(query.dtype)
    if wanted[1]:
        of_key = compare_columns(pair, lses, kind, upstream)
    return of_query, of_key


@torch.library.custom_op("xarch_kd::ssd_statistics", mutates_args=())
def ssd_statistics(
    C: torch.Tensor,
    B: torch.Tensor,
    log_decay: torch.Tensor,
    dt: torch.Tensor,
    D: torch.Tensor | None,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    valid_range: torch.Tensor,
    head_map: torch.Tensor | None,
    scale: float,
    cap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Σ P̄², Σ P̄ M, Σ M² of each row [3, batch, heads, time] (float64), and two tensors for the backward pass.

    The arguments are the fields of `mixing_ssd.SSDPair`; the teacher is causal.
    """
    pair = SSDPair(C, B, log_decay, dt, D, teacher_query, teacher_key, valid_range, head_map, scale, cap, window)
    return mixing_ssd.statistics(pair.packed())


@torch.library.custom_op("xarch_kd::ssd_gradients", mutates_args=())
def ssd_gradients(
    C: torch.Tensor,
    B: torch.Tensor,
    log_decay: torch.Tensor,
    dt: torch.Tensor,
    D: torch.Tensor | None,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    valid_range: torch.Tensor,
    head_map: torch.Tensor | None,
    scale: float,
    cap: float,
    window: int,
    saved: torch.Tensor,
    teacher_lse: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of C, B, log_decay, dt and D (empty without one) for ∂L/∂M = a P̄ + b M."""
    pair = SSDPair(C, B, log_decay, dt, D, teacher_query, teacher_key, valid_range, head_map, scale, cap, window)
    return mixing_ssd.gradients(pair.packed(), saved, teacher_lse, a, b)


@softmax_divergence.register_fake
def _(query: Any, key: Any, teacher_query: Any, teacher_key: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    rows, teacher_rows = _row_numbers(query), _row_numbers(teacher_query)
    slopes = query.shape if rest[-1] else (0, 0, 0, 0)
    return rows, query.new_empty(slopes, dtype=saved_dtype(query)), torch.empty_like(rows), teacher_rows


@softmax_statistics.register_fake
def _(query: Any, key: Any, teacher_query: Any, teacher_key: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    rows = _row_numbers(query)
    return rows.new_empty(3, *rows.shape), rows, _row_numbers(teacher_query)


@softmax_gradients.register_fake
def _(query: Any, key: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _gradients_like((query, key), rest[-1])


def _row_numbers(query: torch.Tensor) -> torch.Tensor:
    batch, time, heads, _ = query.shape
    return query.new_empty(batch, heads, time, dtype=torch.float32)


def _gradients_like(tensors: Sequence[torch.Tensor], wanted: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    pairs = zip(tensors, wanted, strict=True)
    return tuple(tensor.new_empty(tensor.shape if want else (0,)) for tensor, want in pairs)


def _keep(ctx: Any, inputs: Sequence[Any], *more: torch.Tensor) -> None:
    """Save the tensors of a pair and `more` for the backward pass."""
    ctx.save_for_backward(*inputs[:TENSORS], *more)
    ctx.settings = inputs[TENSORS:PAIR]


def _setup_divergence(ctx: Any, inputs: Sequence[Any], output: Sequence[torch.Tensor]) -> None:
    _keep(ctx, inputs, *output[1:])
    ctx.kind = inputs[PAIR]
    ctx.mark_non_differentiable(*output[1:])


def _divergence_backward(ctx: Any, upstream: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    pair, (slopes, lse, teacher_lse) = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
    of_query = of_key = None
    if ctx.needs_input_grad[0]:
        of_query = (slopes * upstream.transpose(1, 2)[..., None]).to(pair[0].dtype)
    if ctx.needs_input_grad[1]:
        wanted = [False, True]
        of_key = torch.ops.xarch_kd.softmax_gradients(
            *pair, *ctx.settings, ctx.kind, lse, teacher_lse, upstream, wanted
        )[1]
    return of_query, of_key, *[None] * PAIR


def _setup_statistics(ctx: Any, inputs: Sequence[Any], output: Sequence[torch.Tensor]) -> None:
    _keep(ctx, inputs, *output)
    ctx.mark_non_differentiable(*output[1:])


def _statistics_backward(ctx: Any, upstream: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    pair, (statistics, lse, teacher_lse) = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
    a, b = upstream[1], 2 * upstream[2]
    rows = torch.stack([a, b, a * statistics[1] + b * statistics[2]])
    wanted = list(ctx.needs_input_grad[:2])
    gradients = torch.ops.xarch_kd.softmax_gradients(*pair, *ctx.settings, "statistics", lse, teacher_lse, rows, wanted)
    given = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return *given, *[None] * (PAIR - 2)


@ssd_statistics.register_fake
def _(C: Any, B: Any, log_decay: Any, dt: Any, D: Any, teacher_query: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    batch, time, heads = dt.shape
    statistics = dt.new_empty(3, batch, heads, time, dtype=torch.float64)
    return statistics, torch.empty_like(statistics, dtype=torch.float32), _row_numbers(teacher_query)


@ssd_gradients.register_fake
def _(C: Any, B: Any, log_decay: Any, dt: Any, D: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    gradients = [tensor.new_empty(tensor.shape) for tensor in (C, B, log_decay, dt)]
    return *gradients, C.new_empty(0) if D is None else D.new_empty(D.shape)


def _setup_ssd(ctx: Any, inputs: Sequence[Any], output: Sequence[torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:SSD_TENSORS], *output[1:])
    ctx.settings = inputs[SSD_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])


def _ssd_backward(ctx: Any, upstream: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    pair, saved = ctx.saved_tensors[:SSD_TENSORS], ctx.saved_tensors[SSD_TENSORS:]
    gradients = torch.ops.xarch_kd.ssd_gradients(*pair, *ctx.settings, *saved, upstream[1], 2 * upstream[2])
    wanted = zip(gradients, ctx.needs_input_grad[: len(gradients)], strict=True)
    given = [gradient if want else None for gradient, want in wanted]
    return *given, *[None] * (len(SSDPair._fields) - len(given))


softmax_divergence.register_autograd(_divergence_backward, setup_context=_setup_divergence)
softmax_statistics.register_autograd(_statistics_backward, setup_context=_setup_statistics)
ssd_statistics.register_autograd(_ssd_backward, setup_context=_setup_ssd)
