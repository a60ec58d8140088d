"""A map of heads that is learned: each student head is taught by a mixture of teacher heads."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.ops import checks
from xarch_kd.projectors.heads import head_products

# A start from a given map leaves this much to all teacher heads, so that no weight is 0 and can grow.
SPREAD: Final = 0.1


class HeadMap(nn.Module):
    """Weights softmax(logits) [student heads, teacher heads]: not negative, and rows sum to 1.

    Distances of mixing matrices give no gradient to such weights, and should not: a target that learns comes to meet
    the student. `forward` is the map's own objective, which changes nothing but the map.

    `initial` [student heads, teacher heads], as of `head_map` or `assignment`, is where it starts; by default all
    weights are equal. Raises UsageError where it does not fit.
    """

    def __init__(self, student_heads: int, teacher_heads: int, *, initial: Tensor | None = None) -> None:
        super().__init__()
        checks.check_shape("initial", initial, (student_heads, teacher_heads), "[student heads, teacher heads]")
        self.logits = nn.Parameter(torch.zeros(student_heads, teacher_heads))
        if initial is not None:
            totals = initial.sum(1, keepdim=True)
            if bool((initial < 0).any()) or not bool((totals > 0).all()):
                raise UsageError("heads: the weights to start from must not be negative, with a positive one a row.")
            with torch.no_grad():
                self.logits.copy_(((1 - SPREAD) * initial / totals + SPREAD / teacher_heads).log())

    def weights(self) -> Tensor:
        """Return the weights [student heads, teacher heads], with a gradient to the logits; detached as a head map."""
        return torch.softmax(self.logits, dim=1)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean over student heads of 1 - cosine of its output with its mixture of the teacher's, a scalar.

        Arguments as of `head_costs`; only the logits get a gradient. A head of zeros is at a distance of 1.
        """
        cross, own, gram = head_products(student, teacher, mask)
        weights = self.weights().to(cross)
        length = own * ((weights @ gram) * weights).sum(1)
        kept = length > 0
        cosine = (weights * cross).sum(1) / length.where(kept, 1).sqrt()
        return 1 - cosine.where(kept, 0).mean()
