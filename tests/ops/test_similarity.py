"""`similarity` and its mergeable sums against HSIC_1 reimplemented from Gram matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import LayerSimilarity, SimilaritySums, similarity

IMPLEMENTATIONS = ("reference", "streaming")
TOKENS, STUDENT, TEACHER = 37, 6, 9


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Return features that share a part."""
    shared = normal(0, tokens, 4)
    student = shared @ normal(1, 4, STUDENT) + normal(2, tokens, STUDENT)
    return student, shared @ normal(3, 4, TEACHER) + normal(4, tokens, TEACHER)


def hsic(x: Tensor, y: Tensor) -> float:
    """HSIC_1 by its definition: averages of products of Gram entries over 2, 3 and 4 different tokens."""
    n = x.shape[0]
    k, m = x @ x.T, y @ y.T
    k, m = k - k.diag().diag(), m - m.diag().diag()
    two = (k * m).sum() / (n * (n - 1))
    # Σ over different i, j, r of K_ij L_ir, and over different i, j, q, r of K_ij L_qr.
    three_sum = (k.sum(1) * m.sum(1)).sum() - (k * m).sum()
    four_sum = k.sum() * m.sum() - 4 * three_sum - 2 * (k * m).sum()
    three = three_sum / (n * (n - 1) * (n - 2))
    return float(two - 2 * three + four_sum / (n * (n - 1) * (n - 2) * (n - 3)))


def cka(x: Tensor, y: Tensor) -> float:
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [4, 5, TOKENS])
def test_equals_the_gram_form(tokens: int, impl: str) -> None:
    student, teacher = features(tokens)
    found = similarity(student, teacher, impl=impl, chunk_size=5)
    assert float(found.together) == pytest.approx(hsic(student, teacher), rel=1e-9)
    assert float(found.student) == pytest.approx(hsic(student, student), rel=1e-9)
    assert float(found.teacher) == pytest.approx(hsic(teacher, teacher), rel=1e-9)
    assert float(found.total) == pytest.approx(cka(student, teacher), rel=1e-9)


def test_every_pair_of_layers_sums_over_batches() -> None:
    batches = [[normal(seed + 10 * layer, 12, 3 + layer) for layer in range(5)] for seed in range(4)]
    sums = LayerSimilarity()
    for batch in batches:
        sums.update(batch[:2], batch[2:])
    found = sums.result()
    assert sums.batches == 4
    for one in range(2):
        assert float(found.student[one]) == pytest.approx(sum(hsic(b[one], b[one]) for b in batches), rel=1e-9)
        for other in range(3):
            parts = sum(hsic(b[one], b[2 + other]) for b in batches)
            own = [sum(hsic(b[layer], b[layer]) for b in batches) for layer in (one, 2 + other)]
            assert float(found.together[one, other]) == pytest.approx(parts, rel=1e-9, abs=1e-12)
            assert float(found.total[one, other]) == pytest.approx(
                parts / (own[0] * own[1]) ** 0.5, rel=1e-9, abs=1e-12
            )


def test_one_batch_of_layers_equals_the_pair() -> None:
    student, teacher = features()
    sums = LayerSimilarity()
    sums.update([student, teacher], [teacher])
    assert float(sums.result().total[0, 0]) == pytest.approx(cka(student, teacher), rel=1e-9)
    assert float(sums.result().total[1, 0]) == pytest.approx(1, rel=1e-9)


# Rounding to float32 moves features near 1000 by up to 3e-5 and near 10000 by up to 5e-4, of a spread of about 2; CKA
# moves by a few times as much.
@pytest.mark.parametrize(("offset", "tolerance"), [(1000, 2e-4), (10000, 2e-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_large_offset_keeps_its_digits_in_float32(
    impl: str, dtype: torch.dtype, offset: int, tolerance: float
) -> None:
    student, teacher = features()
    expected = cka(student, teacher)
    shifted = student.clone()
    shifted[:, 0] += offset
    found = similarity(shifted.float(), teacher.float(), impl=impl, chunk_size=8, dtype=dtype)
    assert float(found.total) == pytest.approx(expected, abs=tolerance)
    sums = LayerSimilarity(dtype=dtype)
    sums.update([shifted.float()], [teacher.float()])
    assert float(sums.result().total) == pytest.approx(expected, abs=tolerance)


def test_independent_features_are_not_alike_though_few_and_wide() -> None:
    found = [float(similarity(normal(seed, 64, 256), normal(seed + 100, 64, 256)).total) for seed in range(20)]
    # One draw spreads by about 1 / 64 around 0; the plain estimate of the same features is 0.8.
    assert max(abs(value) for value in found) < 0.08
    assert abs(sum(found) / 20) < 0.015


def test_rotation_and_scale_change_nothing() -> None:
    student, teacher = features()
    rotation, _ = torch.linalg.qr(normal(7, STUDENT, STUDENT))
    changed = similarity(3.5 * student @ rotation + 2, teacher)
    assert float(changed.total) == pytest.approx(cka(student, teacher), rel=1e-9)
    assert float(similarity(student, -2 * student @ rotation).total) == pytest.approx(1, rel=1e-9)


def test_merged_halves_equal_the_whole() -> None:
    student, teacher = features()
    first = SimilaritySums()
    first.update(student[:11], teacher[:11])
    second = SimilaritySums(reference=first.reference)
    second.update(student[11:], teacher[11:])
    first.merge(second)
    first.merge(SimilaritySums())
    assert first.tokens == TOKENS
    assert float(first.result().total) == pytest.approx(cka(student, teacher), rel=1e-9)
    empty = SimilaritySums()
    empty.merge(first)
    assert float(empty.result().total) == float(first.result().total)
    stranger = SimilaritySums()
    stranger.update(student[11:], teacher[11:])
    with pytest.raises(UsageError, match="different references"):
        first.merge(stranger)


def test_merging_leaves_the_other_as_it_was() -> None:
    student, teacher = features()
    one, other = SimilaritySums(), SimilaritySums()
    other.update(student, teacher)
    before = float(other.result().together)
    one.merge(other)
    one.update(student * 2, teacher)
    assert float(other.result().together) == before
    layers, more = LayerSimilarity(), LayerSimilarity()
    more.update([student], [teacher])
    layers.merge(more)
    layers.update([student * 2], [teacher])
    assert float(more.result().together) == pytest.approx(hsic(student, teacher), rel=1e-9)
    assert layers.batches == 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_tokens_do_not_count_and_nothing_has_a_gradient(impl: str) -> None:
    student, teacher = features()
    mask = torch.arange(TOKENS) % 3 != 0
    expected = cka(student[mask], teacher[mask])
    student[~mask] = torch.nan
    found = similarity(student.requires_grad_().view(1, TOKENS, -1), teacher[None], mask=mask[None], impl=impl)
    assert float(found.total) == pytest.approx(expected, rel=1e-9)
    assert not found.total.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fewer_than_four_tokens_is_an_error(impl: str) -> None:
    student, teacher = features()
    with pytest.raises(UsageError, match="so few tokens"):
        similarity(student[:3], teacher[:3], impl=impl)
    with pytest.raises(UsageError, match="so few tokens"):
        similarity(student, teacher, mask=torch.arange(TOKENS) < 3, impl=impl)
    with pytest.raises(UsageError, match="so few tokens"):
        LayerSimilarity().update([student[:3]], [teacher[:3]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_has_no_similarity_is_an_error(impl: str) -> None:
    student, teacher = features()
    with pytest.raises(UsageError, match="do not vary"):
        similarity(torch.ones_like(student), teacher, impl=impl)
    student[3, 2] = torch.inf
    with pytest.raises(NonFiniteLoss):
        similarity(student, teacher, impl=impl)


def test_tensors_that_do_not_fit_are_errors() -> None:
    student, teacher = features()
    with pytest.raises(UsageError, match="teacher does not fit"):
        similarity(student, teacher[1:])
    with pytest.raises(UsageError, match="mask must be boolean"):
        similarity(student, teacher, mask=torch.ones(TOKENS))
    with pytest.raises(UsageError, match="floating point"):
        similarity(student.long(), teacher)
    with pytest.raises(UsageError, match="student does not fit"):
        similarity(student[0], teacher[0])
    sums = SimilaritySums()
    sums.update(student, teacher)
    with pytest.raises(UsageError, match="student does not fit"):
        sums.update(student[:, 1:], teacher)
    layers = LayerSimilarity()
    with pytest.raises(UsageError, match="no layers"):
        layers.update([], [teacher])
    with pytest.raises(UsageError, match="no batch"):
        layers.result()
    layers.update([student], [teacher])
    with pytest.raises(UsageError, match="layers does not fit"):
        layers.update([student, student], [teacher])
