"""Learned head map: each student head learns from a trained mixture of teacher heads."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.ops import checks
from xarch_kd.projectors.heads import head_products

# Total weight that an initial map leaves to all teacher heads: a weight of 0 could not grow.
SPREAD: Final = 0.1


class HeadMap(nn.Module):
    """Weights softmax(logits) [student heads, teacher heads]: non-negative, rows sum to 1.

    Distances of mixing matrices give no gradient to these weights: a trainable target would move towards the student.
    `forward` is the loss of the map itself and has no gradient with respect to anything else.

    `initial` [student heads, teacher heads], e.g. from `head_map` or `assignment`, is the initial value; by default
    all weights are equal. Raises UsageError if it does not fit.

    >>> from xarch_kd.projectors import HeadMap
    >>> HeadMap(4, 2).weights().shape
    torch.Size([4, 2])
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
        """Return the weights [student heads, teacher heads], with a gradient to the logits; detach to use as a map."""
        return torch.softmax(self.logits, dim=1)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean over student heads of 1 - cosine of its output with its mixture of the teacher's, a scalar.

        Arguments as in `head_costs`; only the logits get a gradient. A head whose output is 0 is at distance 1.
        """
        cross, own, gram = head_products(student, teacher, mask)
        weights = self.weights().to(cross)
        length = own * ((weights @ gram) * weights).sum(1)
        kept = length > 0
        cosine = (weights * cross).sum(1) / length.where(kept, 1).sqrt()
        return 1 - cosine.where(kept, 0).mean()
