"""The linear projector, random or fitted in closed form."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError, suggest
from xarch_kd.projectors.base import Projector, Split

KINDS: Final = ("auto", "none", "linear")


class LinearProjector(Projector):
    """y = student weightᵀ (+ bias): [..., student width] → [..., teacher width]; weight is [teacher, student].

    It starts as an isometry: the identity for equal widths, else a random semi-orthogonal matrix, drawn from
    `generator`.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_width, student_width))
        self.bias = nn.Parameter(torch.zeros(teacher_width)) if bias else None
        with torch.no_grad():
            if student_width == teacher_width:
                nn.init.eye_(self.weight)
            else:
                nn.init.orthogonal_(self.weight, generator=generator)

    def split(self, student: Tensor) -> Split:
        """Return student, weight and bias."""
        return Split(student, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, penalty: float = 1e-3) -> None:
        """Set weight (and bias) to the ridge solution from features [..., width] of the tokens that count."""
        if mask is not None:
            student, teacher = student[mask], teacher[mask]
        weight, offset = ridge(
            student.flatten(0, -2), teacher.flatten(0, -2), penalty=penalty, bias=self.bias is not None
        )
        self.weight.copy_(weight)
        if self.bias is not None and offset is not None:
            self.bias.copy_(offset)


@torch.no_grad()
def ridge(
    student: Tensor, teacher: Tensor, *, penalty: float = 1e-3, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return weight [teacher, student] and bias [teacher] (or None) of the ridge regression of teacher on student.

    Minimises |student weightᵀ + bias - teacher|² / tokens + λ|weight|², λ = penalty * mean eigenvalue of the student's
    second moment, in float64. Features are [tokens, width].
    """
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0] or student.shape[0] == 0:
        raise UsageError(
            "A projector is fitted to matching rows of features.",
            found=f"student {list(student.shape)}, teacher {list(teacher.shape)}",
            allowed="[tokens, student width] and [tokens, teacher width], at least one token",
        )
    x, y = student.double(), teacher.double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
    x, y = x - mean_x, y - mean_y
    moment = x.T @ x / x.shape[0]
    scale = moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    regularised = moment + penalty * scale * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(regularised, x.T @ y / x.shape[0]).T
    return weight, mean_y - weight @ mean_x if bias else None


def build_projector(
    kind: str, student_width: int, teacher_width: int, *, generator: torch.Generator | None = None
) -> LinearProjector | None:
    """Return the projector of `kind`: `none`, `linear`, or `auto`, which is linear only where widths differ.

    Raises:
        UsageError: an unknown kind, or `none` where widths differ.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no such projector.{suggest(kind, KINDS)}", asked=kind, allowed=" | ".join(KINDS))
    if kind == "none" and student_width != teacher_width:
        raise UsageError(
            "Without a projector student and teacher must have the same width.",
            asked="projector: none",
            found=f"student {student_width}, teacher {teacher_width}",
            fix="projector: linear, or auto",
        )
    if kind == "linear" or student_width != teacher_width:
        return LinearProjector(student_width, teacher_width, generator=generator)
    return None
