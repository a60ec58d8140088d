"""Standardized features: the statistics, their fold into a projector, and token-wise losses with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.features import LOSSES, feature_loss, feature_normalizer
from xarch_kd.losses.standardize import LEAST_SHARE, FeatureStatistics, Standardizer
from xarch_kd.projectors import LinearProjector

SHAPE, STUDENT_WIDTH, TEACHER_WIDTH = (4, 7), 5, 8


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_teacher() -> Tensor:
    """Features with a massive dimension and one with a large offset."""
    scale, offset = torch.ones(TEACHER_WIDTH).double(), torch.zeros(TEACHER_WIDTH).double()
    scale[2], offset[5] = 300, 70
    return normal(1, *SHAPE, TEACHER_WIDTH) * scale + offset


def some_mask() -> Tensor:
    return torch.arange(SHAPE[1]) < torch.tensor([7, 2, 0, 5])[:, None]


def test_statistics_are_those_of_all_tokens_that_count_in_any_pieces() -> None:
    teacher, mask = a_teacher(), some_mask()
    poisoned = teacher.masked_fill(~mask[..., None], float("nan")).float()
    parts = [FeatureStatistics(), FeatureStatistics(), FeatureStatistics()]
    for at in range(SHAPE[0]):
        parts[at % 2].update(poisoned[at], mask[at])
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    parts[2].merge(FeatureStatistics())
    rows = teacher.float().double()[mask]
    assert parts[2].tokens == 14 and parts[2].mean is not None
    found = parts[2].standardizer()
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.deviation, rows.std(0, correction=0), rtol=1e-12, atol=0)


def test_a_large_offset_costs_no_digits() -> None:
    values = 1e6 + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    statistics = FeatureStatistics()
    for value in values:
        statistics.update(value.view(1, 1))
    torch.testing.assert_close(
        statistics.standardizer().deviation, values.std(0, correction=0)[None], rtol=1e-9, atol=0
    )


def test_standardized_tokens_have_mean_0_and_deviation_1() -> None:
    teacher = a_teacher()
    statistics = FeatureStatistics()
    statistics.update(teacher)
    found = statistics.standardizer().apply(teacher).flatten(0, 1)
    assert found.mean(0).abs().max() < 1e-12 and (found.std(0, correction=0) - 1).abs().max() < 1e-12


def test_a_dimension_that_does_not_vary_gets_no_weight_without_bound() -> None:
    variance = torch.tensor([0.0, 4.0, 1.0, 1e-20], dtype=torch.float64)
    deviation = Standardizer.from_moments(10, torch.zeros(4), variance).deviation
    # The median of those that vary, 1e-10, 1 and 2.
    assert deviation.tolist() == [LEAST_SHARE, 2.0, 1.0, LEAST_SHARE]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_that_of_standardized_features(kind: str, projected: bool, bias: bool) -> None:
    teacher, mask = a_teacher(), some_mask()
    statistics = FeatureStatistics()
    statistics.update(teacher)
    standardizer = statistics.standardizer()
    mean, deviation = standardizer.mean, standardizer.deviation
    projector = LinearProjector(STUDENT_WIDTH, TEACHER_WIDTH, bias=bias).double() if projected else None
    student = normal(0, *SHAPE, STUDENT_WIDTH if projected else TEACHER_WIDTH)
    own, again = student.clone().requires_grad_(), student.clone().requires_grad_()
    normalizer = feature_normalizer(kind, teacher, mask, standardizer=standardizer)
    loss = feature_loss(
        kind, own, teacher, normalizer=normalizer, mask=mask, projector=projector, standardizer=standardizer, delta=0.7
    )
    loss.backward()
    found = [
        own.grad,
        *(() if projector is None else (p.grad.clone() for p in projector.parameters() if p.grad is not None)),
    ]
    if projector is not None:
        projector.zero_grad()
    y = again if projector is None else projector(again)
    y, t = (y - mean) / deviation, (teacher - mean) / deviation
    expected = feature_loss(
        kind, y, t, normalizer=feature_normalizer(kind, t, mask), mask=mask, delta=0.7, impl="reference"
    )
    expected.backward()
    wanted = [again.grad, *(() if projector is None else (p.grad for p in projector.parameters()))]
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        # The large offset over the deviation, 70, times roundings.
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_massive_dimension_that_differs_takes_no_more_than_its_share() -> None:
    teacher = a_teacher()
    student = teacher + 0.5 * teacher.std((0, 1)) * normal(2, *SHAPE, TEACHER_WIDTH)
    statistics = FeatureStatistics()
    statistics.update(teacher)

    def share(standardizer: Standardizer | None) -> float:
        """The part of the squared gradient that falls on the massive dimension, each in its own size."""
        leaf = student.clone().requires_grad_()
        feature_loss("mse", leaf, teacher, normalizer=28.0, standardizer=standardizer).backward()
        assert leaf.grad is not None
        parts = (leaf.grad * teacher.std((0, 1))).square().sum((0, 1))
        return float(parts[2] / parts.sum())

    assert share(None) > 0.999
    assert share(statistics.standardizer()) < 3 / TEACHER_WIDTH


def test_narrow_features_are_standardized_wide_and_stay_in_the_graph() -> None:
    standardizer = Standardizer(torch.full((3,), 2.0), torch.full((3,), 4.0))
    narrow = torch.full((2, 3), 3.0, dtype=torch.bfloat16, requires_grad=True)
    found = standardizer.apply(narrow)
    found.sum().backward()
    assert found.dtype == torch.float32 and found.tolist() == [[0.25] * 3] * 2
    assert narrow.grad is not None and narrow.grad.unique().tolist() == [0.25]
    _, weight, bias = standardizer.fold(narrow, torch.ones(3, 3).bfloat16(), None)
    assert weight is not None and bias is not None and (weight.dtype, bias.dtype) == (torch.float32, torch.float32)


def test_the_state_comes_back() -> None:
    first = Standardizer(normal(0, 4), normal(1, 4).abs())
    again = Standardizer.from_state(first.to("cpu").state())
    assert torch.equal(again.mean, first.mean) and torch.equal(again.deviation, first.deviation) and again.dim == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Standardizer(torch.zeros(3), torch.ones(4)), "deviation does not fit"),
        (lambda: Standardizer(torch.zeros(3, 1), torch.ones(3, 1)), "mean does not fit"),
        (lambda: Standardizer(torch.zeros(3), torch.zeros(3)), "above 0"),
        (lambda: Standardizer(torch.tensor([float("nan")]), torch.ones(1)), "finite"),
        (lambda: Standardizer.from_moments(1, torch.zeros(3), torch.ones(3)), "so few tokens"),
        (lambda: Standardizer.from_moments(9, torch.zeros(3), torch.zeros(3)), "do not vary"),
        (lambda: FeatureStatistics().standardizer(), "no tokens"),
        (lambda: FeatureStatistics().update(torch.zeros(2, 3), torch.ones(2)), "boolean"),
        (lambda: Standardizer(torch.zeros(3), torch.ones(3)).apply(torch.zeros(2, 4)), "features does not fit"),
        (
            lambda: Standardizer(torch.zeros(3), torch.ones(3)).fold(torch.zeros(2, 4), torch.zeros(4, 4), None),
            "weight does not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()


def test_statistics_of_other_dims_are_refused() -> None:
    statistics = FeatureStatistics()
    statistics.update(torch.ones(2, 3))
    with pytest.raises(UsageError, match="dim of the first call"):
        statistics.update(torch.ones(2, 4))
