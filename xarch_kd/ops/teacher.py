"""The forms in which a teacher's next-token distributions are given, other than as hidden states and a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.ops import checks

# The tail of a teacher whose named entries have all of the mass, to float32's rounding of 1.
SMALLEST_TAIL = 2.0**-23
# How far the named mass may exceed 1 in float32, and how many roundings of log-probabilities kept in fewer bits.
MASS_TOLERANCE = 1e-4
MASS_ROUNDINGS = 4


@dataclass(frozen=True, kw_only=True)
class TeacherTopK:
    """The k likeliest entries of a teacher's softened distributions: `indices` and `log_probabilities` [..., k].

    The leading axes are those of the student's hidden states. Log-probabilities, in nats, are those of the full
    distribution at the temperature of the call, log_softmax(logits / temperature), not renormalized over the k.

    What is compared are k + 1 buckets: the k entries and one tail for all others, with the teacher's
    p_tail = 1 - Σ p_j (at least 2⁻²³) and the student's q_tail, the sum of its probabilities over every entry that is
    not named. D(buckets of p, buckets of q) is defined for every divergence of `Divergence`, never negative, and a
    lower bound of the divergence of the full distributions: merging entries cannot add any (data processing). It is 0
    as soon as the student agrees on the k entries and thereby on the mass of the tail, whose shape is not compared.

    The gradient is exact for that value. With the buckets' logits b = (z_1, ..., z_k, log Σ_tail e^z) and
    s = ∂D/∂b, of the closed form of the divergence over k + 1 entries, it is s_j at a named entry and
    s_tail q_v / q_tail at an entry v of the tail; for forward KL q_j - p_j and q_v (1 - p_tail / q_tail).

    >>> import torch
    >>> from xarch_kd import ops
    >>> top = torch.randn(2, 4, 50).log_softmax(-1).topk(5)
    >>> ops.TeacherTopK(indices=top.indices, log_probabilities=top.values).indices.shape
    torch.Size([2, 4, 5])
    """

    indices: Tensor
    log_probabilities: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, temperature: float = 1.0) -> TeacherTopK:
        """Return the k likeliest entries of softmax(logits / temperature), logits [..., vocabulary]."""
        wide = logits.detach().to(checks.accumulation_dtype(logits))
        top = torch.log_softmax(wide / temperature, -1).topk(k, -1)
        return cls(indices=top.indices, log_probabilities=top.values)


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Teacher logits [..., columns] of every token, finite, before the temperature, scale and softcap applied.

    The leading axes are those of the student's hidden states; columns past the shared vocabulary are padding.

    >>> import torch
    >>> from xarch_kd import ops
    >>> ops.TeacherLogits(torch.randn(2, 4, 50)).values.shape
    torch.Size([2, 4, 50])
    """

    values: Tensor


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Named entries `indices` [k, named] of each token that counts, and log p of them and the tail [k, named + 1]."""

    indices: Tensor
    log_probabilities: Tensor

    def rows(self, at: slice) -> Buckets:
        """Return those of a range of the tokens that count."""
        return Buckets(indices=self.indices[at], log_probabilities=self.log_probabilities[at])


def check_logits(logits: Tensor, leading: torch.Size) -> None:
    """Raise UsageError unless `logits` is floating point, [leading axes, columns]."""
    checks.check_floating(**{"teacher.values": logits})
    columns = logits.shape[-1] if logits.dim() else 0
    checks.check_shape("teacher.values", logits, (*leading, columns), "[leading axes of student_hidden, vocabulary]")


def read_top_k(given: TeacherTopK, leading: torch.Size, valid_indices: Tensor | None, vocabulary: int) -> Buckets:
    """Check the entries of the tokens that count and return them with their tail, in at least float32.

    Raises:
        UsageError: shapes or dtypes that do not fit, an index outside the vocabulary or twice for a token,
            log-probabilities that are not finite or probabilities that sum to more than 1, or no entry or all of them.
    """
    indices, log_probabilities = given.indices, given.log_probabilities.detach()
    _check_form(indices, log_probabilities, leading, vocabulary)
    named = indices.shape[-1]
    indices, log_probabilities = (
        rows.reshape(-1, named) if valid_indices is None else rows.reshape(-1, named).index_select(0, valid_indices)
        for rows in (indices, log_probabilities)
    )
    _check_indices(indices, vocabulary)
    log_probabilities = log_probabilities.to(checks.accumulation_dtype(log_probabilities))
    mass = log_probabilities.double().exp().sum(-1, keepdim=True)
    _check_mass(log_probabilities, mass, given.log_probabilities.dtype)
    tail = (1 - mass).clamp_min(SMALLEST_TAIL).log().to(log_probabilities.dtype)
    return Buckets(indices=indices.long(), log_probabilities=torch.cat([log_probabilities, tail], -1))


def _check_form(indices: Tensor, log_probabilities: Tensor, leading: torch.Size, vocabulary: int) -> None:
    checks.check_floating(**{"teacher.log_probabilities": log_probabilities})
    if indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise UsageError("teacher.indices must be integers.", found=indices.dtype, allowed="an integer dtype")
    named = indices.shape[-1] if indices.dim() else 0
    expected = (*leading, named)
    checks.check_shape("teacher.indices", indices, expected, "[leading axes of student_hidden, k]")
    checks.check_shape("teacher.log_probabilities", log_probabilities, expected, "[axes of the indices]")
    if not 1 <= named < vocabulary:
        raise UsageError(
            "TeacherTopK leaves no entry for its tail." if named else "TeacherTopK names no entry.",
            found=f"k={named} of a vocabulary of {vocabulary}",
            allowed=f"1 to {vocabulary - 1}",
            fix="give all of them as TeacherLogits" if named else None,
        )


def _check_indices(indices: Tensor, vocabulary: int) -> None:
    wrong = (indices < 0) | (indices >= vocabulary)
    if bool(wrong.any()):
        raise UsageError(
            "An index of TeacherTopK is outside the vocabulary that is compared.",
            found=int(indices[wrong][0]),
            allowed=f"0 to {vocabulary - 1}",
        )
    ordered = indices.sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if bool(twice.any()):
        raise UsageError(
            "TeacherTopK names an entry of the vocabulary twice for one token.",
            found=int(ordered[:, 1:][twice][0]),
            allowed="k different indices",
        )


def _check_mass(log_probabilities: Tensor, mass: Tensor, kept_in: torch.dtype) -> None:
    if not bool(torch.isfinite(log_probabilities).all()):
        raise UsageError(
            "teacher.log_probabilities must be finite.",
            found="a NaN or infinite entry",
            fix="name fewer entries, so that each has a probability above 0",
        )
    allowed = 1 + max(MASS_TOLERANCE, MASS_ROUNDINGS * torch.finfo(kept_in).eps)
    if bool((mass > allowed).any()):
        raise UsageError(
            "The probabilities that TeacherTopK names sum to more than 1.",
            found=f"{float(mass.max()):.6g}",
            allowed=f"at most {allowed:.6g}",
            fix="give log-probabilities of the full distribution at the temperature of the call, in nats",
        )
