"""`linear_divergence` with the tensors and numbers of both models by name, so that a test varies one at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xarch_kd.ops import DivergenceLoss, Head, TeacherLogits, TeacherTopK, linear_divergence

PARTS = ("bias", "scale", "softcap")


def flat_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_top_k: TeacherTopK | None = None,
    **given: Any,
) -> DivergenceLoss:
    """Return `linear_divergence` of heads made of `student_bias`, `teacher_scale` and so on; `given` has the rest."""
    heads: dict[str, dict[str, Any]] = {"student": {"weight": student_weight}, "teacher": {}}
    if teacher_weight is not None:
        heads["teacher"]["weight"] = teacher_weight
    for side, head in heads.items():
        head |= {part: given.pop(f"{side}_{part}") for part in PARTS if f"{side}_{part}" in given}
    forms = (teacher_hidden, None if teacher_logits is None else TeacherLogits(teacher_logits), teacher_top_k)
    (teacher,) = (form for form in forms if form is not None)
    teacher_head = Head(**heads["teacher"]) if heads["teacher"] else None
    return linear_divergence(student_hidden, Head(**heads["student"]), teacher, teacher_head, **given)
