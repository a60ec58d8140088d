"""`mixing_distance` by the kernels of `kernels/mixing_distance.py`: softmax teachers, softmax and SSD students."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xarch_kd.mixing import Mixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops.dispatch import kernel_unsupported_reason
from xarch_kd.ops.row_distances import EntryFormula, LogarithmFormula

WIDEST: Final = 256


def unsupported_reason(
    student: Mixing, teacher: Mixing, formula: EntryFormula | LogarithmFormula, head_map: Tensor | None
) -> str | None:
    """Return why the kernels cannot compare these two mixings, or None when they can."""
    if not isinstance(teacher, SoftmaxMixing) or not isinstance(student, SoftmaxMixing | SSDMixing):
        return (
            "there are kernels for softmax teachers with softmax and ssd students, "
            f"not for {teacher.kind} with {student.kind}"
        )
    if (formula.kernel if isinstance(formula, LogarithmFormula) else formula.of_products) is None:
        return f"there is no kernel for the distance '{formula.name}'"
    if isinstance(student, SSDMixing):
        if isinstance(formula, LogarithmFormula):
            return f"{formula.name} compares probabilities, and an ssd student's rows are none"
        if not teacher.causal:
            return "the kernels for ssd students read the teacher's causal half only, and this teacher is not causal"
    if teacher.sinks is not None or (isinstance(student, SoftmaxMixing) and student.sinks is not None):
        return "the kernels have no attention sinks"
    widest = max(_widths(teacher), _widths(student))
    if widest > WIDEST:
        return f"the kernels take heads of at most {WIDEST} numbers, and these have {widest}"
    return kernel_unsupported_reason(*teacher.factors.values(), *student.factors.values(), head_map)


def rows(
    student: SoftmaxMixing | SSDMixing,
    teacher: SoftmaxMixing,
    formula: EntryFormula | LogarithmFormula,
    head_map: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Return the distance of each row [batch, time, student heads] in float32, 0 where a row does not count.

    kl_i = Σ_j P̄_ij log(P̄_ij / S_ij), cross_entropy_i = −Σ_j P̄_ij log S_ij; of pp = Σ_j P̄², pm = Σ_j P̄ M, mm = Σ_j M²:
    frobenius pp − 2 pm + mm, relative_frobenius that over pp + ε, cosine 1 − pm / √((pp + ε)(mm + ε)). Gradients go to
    the student's factors. Call it where `unsupported_reason` returns None.
    """
    ranges = torch.cat([_valid_range(student), _valid_range(teacher)], 1).to(torch.int32)
    with torch.autocast(student.device.type, enabled=False):
        if isinstance(formula, LogarithmFormula):
            assert isinstance(student, SoftmaxMixing) and formula.kernel is not None
            values = _divergence(student, teacher, formula.kernel, head_map, ranges)
        else:
            assert formula.of_products is not None
            # Three numbers per row: in float64 a slope a P + b M that nearly cancels loses nothing to the rounding of
            # a and b.
            pp, pm, mm = _statistics(student, teacher, head_map, ranges).double().unbind()
            values = formula.of_products(pp, pm, mm, epsilon).float()
    values = values.transpose(1, 2)
    return torch.where((student.valid_mask() & teacher.valid_mask())[..., None], values, 0.0)


def _widths(mixing: SoftmaxMixing | SSDMixing) -> int:
    return (mixing.query if isinstance(mixing, SoftmaxMixing) else mixing.C).shape[-1]


def _valid_range(mixing: Mixing) -> Tensor:
    """Return start and stop of each sequence, [batch, 2], inside the sequence."""
    if mixing.valid_range is None:
        return torch.tensor([0, mixing.time], device=mixing.device).expand(mixing.batch, 2)
    return mixing.valid_range.clamp(min=0, max=mixing.time)


def _alike(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype: a product has one."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    return query.to(dtype), key.to(dtype)


def _settings(student: SoftmaxMixing, teacher: SoftmaxMixing) -> tuple[list[float], list[float], list[bool], list[int]]:
    both = (student, teacher)
    return (
        [float(mixing.scale) for mixing in both],
        [float(mixing.softcap or 0.0) for mixing in both],
        [mixing.causal for mixing in both],
        [mixing.window or 0 for mixing in both],
    )


def _divergence(
    student: SoftmaxMixing, teacher: SoftmaxMixing, kind: str, head_map: Tensor | None, ranges: Tensor
) -> Tensor:
    from xarch_kd.kernels import mixing_distance as kernels

    slopes = torch.is_grad_enabled() and student.query.requires_grad
    tensors = (*_alike(student.query, student.key), *_alike(teacher.query.detach(), teacher.key.detach()))
    return kernels.softmax_divergence(*tensors, ranges, head_map, *_settings(student, teacher), kind, slopes)[0]


def _statistics(
    student: SoftmaxMixing | SSDMixing, teacher: SoftmaxMixing, head_map: Tensor | None, ranges: Tensor
) -> Tensor:
    """Return Σ P̄², Σ P̄ M, Σ M² of each row [3, batch, student heads, time]."""
    from xarch_kd.kernels import mixing_distance as kernels

    of_teacher = _alike(teacher.query.detach(), teacher.key.detach())
    if isinstance(student, SSDMixing):
        factors = (*_alike(student.C, student.B), student.log_decay, student.dt, student.D)
        settings = (float(teacher.scale), float(teacher.softcap or 0.0), teacher.window or 0)
        return kernels.ssd_statistics(*factors, *of_teacher, ranges, head_map, *settings)[0]
    tensors = (*_alike(student.query, student.key), *of_teacher)
    return kernels.softmax_statistics(*tensors, ranges, head_map, *_settings(student, teacher))[0]
