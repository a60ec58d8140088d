"""Student first, teacher second: swapped sides are refused and the teacher is detached, in every operation and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd import losses, ops
from xarch_kd.errors import UsageError
from xarch_kd.losses.bridge import QueriesAndKeys
from xarch_kd.mixing import SoftmaxMixing
from xarch_kd.projectors import HeadMap, PairStatistics, head_costs

BATCH, TIME, DIM, VOCABULARY = 2, 6, 5, 11


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEAD, FREE_HEAD = draw(0, VOCABULARY, DIM), draw(1, VOCABULARY, DIM).requires_grad_()
LABELS = torch.randint(0, VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(2))
WEIGHT = draw(3, DIM, DIM).requires_grad_()


class Scaling(torch.nn.Module):
    """A projector that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(draw(4, DIM, DIM))

    def split(self, student: Tensor) -> tuple[Tensor, Tensor, None]:
        return student, self.weight, None


def mixing(features: Sequence[Tensor]) -> SoftmaxMixing:
    return SoftmaxMixing(query=features[0].unflatten(2, (1, DIM)), key=features[1].unflatten(2, (1, DIM)), scale=0.5)


def per_head(features: Tensor) -> Tensor:
    return features.unflatten(2, (1, DIM))


def bridge(features: Sequence[Tensor]) -> QueriesAndKeys:
    return QueriesAndKeys(per_head(features[0]), per_head(features[1]))


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], head: Tensor) -> Tensor:
    heads = ops.Head(head), ops.Head(HEAD)
    return losses.token_loss(student[0], heads[0], teacher[0], heads[1], LABELS, normalizer=12.0).total


def top_k(logits: Tensor) -> ops.TeacherTopK:
    top = torch.log_softmax(logits, -1).topk(3, -1)
    return ops.TeacherTopK(indices=top.indices, log_probabilities=top.values)


Call = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
# Each of two features of the student and two of the teacher. A head or projector that trains does not hide a swap.
LOSSES: dict[str, Call] = {
    "linear_divergence": lambda s, t: ops.linear_divergence(s[0], HEAD, t[0], HEAD).total,
    "linear_divergence, head": lambda s, t: ops.linear_divergence(s[0], FREE_HEAD, t[0], HEAD).total,
    "linear_divergence, reference": lambda s, t: ops.linear_divergence(s[0], HEAD, t[0], HEAD, impl="reference").total,
    "linear_divergence, logits": lambda s, t: ops.linear_divergence(s[0], HEAD, ops.TeacherLogits(t[0] @ HEAD.T)).total,
    "linear_divergence, top-k": lambda s, t: ops.linear_divergence(s[0], HEAD, top_k(t[0] @ HEAD.T)).total,
    "mixing_distance": lambda s, t: ops.mixing_distance(mixing(s), mixing(t)).total,
    "mixing_distance, kl": lambda s, t: ops.mixing_distance(mixing(s), mixing(t), distance="kl").total,
    "mixing_distance, panels": lambda s, t: ops.mixing_distance(mixing(s), mixing(t), impl="panels").total,
    "mixing_distance, reference": lambda s, t: ops.mixing_distance(mixing(s), mixing(t), impl="reference").total,
    "mixing_distance, sketch": lambda s, t: (
        ops.mixing_distance(mixing(s), mixing(t), distance="frobenius", impl="sketch", seed=0).total
    ),
    "projected_distance": lambda s, t: ops.projected_distance(s[0], t[0]).total,
    "projected_distance, projector": lambda s, t: ops.projected_distance(s[0], t[0], weight=WEIGHT).total,
    "projected_distance, reference": lambda s, t: ops.projected_distance(s[0], t[0], impl="reference").total,
    "token_loss": lambda s, t: token_loss(s, t, HEAD),
    "token_loss, head": lambda s, t: token_loss(s, t, FREE_HEAD),
    "mixing_loss": lambda s, t: losses.mixing_loss("cosine", mixing(s), mixing(t), normalizer=12.0),
    "attention_bridge": lambda s, t: losses.attention_bridge(bridge(s), bridge(t), normalizer=12.0),
    "cka_loss": lambda s, t: losses.cka_loss(s[0], t[0], normalizer=12.0),
    "gram_loss": lambda s, t: losses.gram_loss(s[0], t[0], normalizer=12.0),
    "relation_loss": lambda s, t: losses.relation_loss(per_head(s[0]), per_head(t[0]), normalizer=12.0),
    "feature_loss, standardized": lambda s, t: losses.feature_loss(
        "mse", s[0], t[0], normalizer=12.0, standardizer=losses.Standardizer(draw(5, DIM), draw(6, DIM).abs() + 1)
    ),
    "feature_loss, projector": lambda s, t: losses.feature_loss(
        "mse", s[0], t[0], normalizer=12.0, projector=Scaling()
    ),
    **{
        f"feature_loss, {kind}": lambda s, t, kind=kind: losses.feature_loss(kind, s[0], t[0], normalizer=12.0)
        for kind in ("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2")
    },
}


def update_of(sums: Any) -> Call:
    return lambda s, t: sums().update(s[0], t[0])


MEASURES: dict[str, Call] = {
    "similarity": lambda s, t: ops.similarity(s[0], t[0]),
    "SimilaritySums": update_of(ops.SimilaritySums),
    "LayerSimilarity": lambda s, t: ops.LayerSimilarity().update([s[0]], [t[0]]),
    "head_costs": lambda s, t: head_costs(per_head(s[0]), per_head(t[0])),
    "PairStatistics": update_of(PairStatistics),
    "HeadMap": lambda s, t: HeadMap(1, 1)(per_head(s[0]), per_head(t[0])),
}


def features(seed: int, trains: bool) -> list[Tensor]:
    return [draw(seed + at, BATCH, TIME, DIM).requires_grad_(trains) for at in range(2)]


@pytest.mark.parametrize("name", [*LOSSES, *MEASURES])
def test_a_call_whose_teacher_alone_requires_gradients_is_refused(name: str) -> None:
    call = (LOSSES | MEASURES)[name]
    student, teacher = features(10, True), features(20, False)
    with pytest.raises(UsageError, match=r"Only the teacher's side requires gradients(.|\n)*swap the two"):
        call(teacher, student)
    call(student, teacher)
    call(features(10, False), teacher)
    with torch.no_grad():
        call(teacher, student)


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_is_detached(name: str) -> None:
    """A teacher that nobody froze gets no gradient, and changes none of the student's."""
    gradients = []
    for frozen in (True, False):
        student, teacher = features(10, True), features(20, not frozen)
        LOSSES[name](student, teacher).sum().backward()
        gradients.append(student[0].grad)
        assert all(tensor.grad is None for tensor in teacher)
    assert gradients[0] is not None and bool(gradients[0].any())
    assert torch.equal(*gradients)
