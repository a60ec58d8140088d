"""Transfer of the teacher's token embeddings to a student of another dimension, preserving inner products.

Of all maps onto k dimensions the one onto the k leading right singular vectors of E [tokens, dim] keeps E Eᵀ best
(Eckart and Young 1936). E is not centered: centering would preserve differences, while models use embeddings in inner
products, such as attention scores and the logits of a tied head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import ModelError

# Rows that are taken to float64 at a time.
CHUNK = 8192


@dataclass(frozen=True)
class Transfer:
    """Record of one transferred matrix. `kept` is the fraction of the squared norm that remains before `scale`."""

    part: str
    rows: int
    teacher_dim: int
    student_dim: int
    kept: float
    scale: float


@torch.no_grad()
def transfer_embeddings(teacher: PreTrainedModel, student: PreTrainedModel, *, rows: int) -> tuple[Transfer, ...]:
    """Set the student's first `rows` token embeddings, and head rows if it is not tied, from the teacher's.

    Equal dimensions: a copy. A wider student: a copy with zeros beyond (an isometry). A narrower one: projection onto
    the leading singular directions, times one factor that brings the mean square to that of the rows it replaces: the
    student's own initialization, at which what its blocks add to the stream and the logits of its head have the size
    that its class is made for. Absolute norms of the teacher are not comparable, since every family scales and
    normalizes its embeddings differently. A tied student gets the teacher's embedding; an untied
    head gets the projection of the teacher's head, onto directions of its own. Raises `ModelError` if a side has
    fewer than `rows` rows.
    """
    head: Any = student.get_output_embeddings()
    pairs: list[tuple[str, Any, Any]] = [("embedding", teacher.get_input_embeddings(), student.get_input_embeddings())]
    if pairs[0][2].weight is not head.weight:
        pairs.append(("head", teacher.get_output_embeddings(), head))
    return tuple(_transfer(part, source.weight, target.weight, rows) for part, source, target in pairs)


def _transfer(part: str, source: Tensor, target: Tensor, rows: int) -> Transfer:
    if rows > min(len(source), len(target)):
        raise ModelError(
            f"The {part}s do not have the rows that are to be taken over.",
            asked=f"{rows} rows",
            found=f"{len(source)} of the teacher, {len(target)} of the student",
        )
    kept, scale = 1.0, 1.0
    if target.shape[1] >= source.shape[1]:
        target[:rows] = 0
        target[:rows, : source.shape[1]] = source[:rows].to(target)
    else:
        directions, kept = leading_directions(source[:rows], target.shape[1])
        projected = torch.cat([chunk.double() @ directions for chunk in source[:rows].split(CHUNK)])
        scale = float(target[:rows].double().norm() / projected.norm().clamp(min=torch.finfo(torch.float64).tiny))
        target[:rows] = (scale * projected).to(target)
    return Transfer(part, rows, source.shape[1], target.shape[1], kept, scale)


def leading_directions(matrix: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the `count` leading right singular vectors of [rows, dim] as float64 [dim, count], and their share.

    The share is of the matrix's squared norm. Of each vector the largest entry is positive, so that the same matrix
    gives the same signs everywhere.
    """
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for chunk in matrix.split(CHUNK):
        wide = chunk.double()
        gram += wide.T @ wide
    values, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, -count:].flip(1)
    largest = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True))
    share = values[-count:].clamp(min=0).sum() / values.clamp(min=0).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return leading * torch.where(largest < 0, -1.0, 1.0), float(share)
