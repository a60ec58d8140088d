"""`mixing_distance` on invalid input: an error with found and allowed, and never a NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops.mixing_formulas import BATCH, TIME, built, head_weights, make_softmax, make_ssd, normal
from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.mixing import Mixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops import mixing_distance
from xarch_kd.ops.mixing_distance import unsupported_reasons

IMPLEMENTATIONS = ("reference", "streaming", "panels", "sketch")


def attention(heads: int = 2, seed: int = 0, sinks: bool = False, **options: Any) -> Mixing:
    return built(SoftmaxMixing, make_softmax(seed, heads, 1, 4, sinks), torch.float64, True, scale=0.5, **options)


def state_space(heads: int = 2, **options: Any) -> Mixing:
    return built(SSDMixing, make_ssd(10, heads, 1), torch.float64, True, **options)


def of_tokens(tokens: int, batch: int = BATCH) -> Mixing:
    return SoftmaxMixing(query=normal(0, batch, tokens, 2, 4), key=normal(1, batch, tokens, 2, 4), scale=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "cosin"}, "Did you mean 'cosine'"),
        ({"reduction": "average"}, "no such reduction"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": float("nan")}, "epsilon must be positive"),
        ({"impl": "fast"}, "no such implementation"),
        ({"mask": torch.ones(BATCH, TIME)}, "mask must be boolean"),
        ({"mask": torch.ones(BATCH, TIME - 1, dtype=torch.bool)}, "mask does not fit"),
        ({"head_map": torch.ones(2, 3)}, "head_map does not fit"),
        ({"head_map": torch.ones(2, 2, dtype=torch.int64)}, "floating point"),
        ({"head_map": torch.tensor([[1.0, -0.5], [0.0, 1.0]])}, "not negative"),
        ({"head_map": torch.tensor([[1.0, float("nan")], [0.0, 1.0]])}, "must be finite"),
        ({"head_map": torch.tensor([[1.0, 0.5], [0.0, 0.0]])}, "without a teacher.*\n.*row 1 is zero"),
        (
            {"head_map": torch.tensor([[0.5, 0.5], [0.5, 0.7]]), "distance": "kl"},
            "must sum to 1.*\n.*row 1 sums to 1.2",
        ),
        ({"mask": torch.zeros(BATCH, TIME, dtype=torch.bool)}, "no token is valid"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixing_distance(attention(seed=5), attention(), **options)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (of_tokens(6), of_tokens(7), "different sequences"),
        (of_tokens(6, batch=2), of_tokens(6), "different sequences"),
        (of_tokens(1), of_tokens(1), "single token"),
        (attention(3), state_space(2), "differ in heads.*\n.*teacher 3, student 2"),
    ],
)
def test_mixings_that_do_not_fit(teacher: Mixing, student: Mixing, message: str) -> None:
    for impl in IMPLEMENTATIONS:
        with pytest.raises(UsageError, match=message):
            mixing_distance(student, teacher, distance="frobenius", impl=impl)


def test_devices_that_differ() -> None:
    elsewhere = attention().map_factors(lambda factor: factor.detach().to("meta").requires_grad_())
    with pytest.raises(UsageError, match="different devices"):
        mixing_distance(elsewhere, attention())
    with pytest.raises(UsageError, match="different devices"):
        mixing_distance(attention(), attention(), head_map=torch.eye(2, device="meta"))


LATE = torch.tensor([[0, TIME], [2, TIME], [1, TIME]])
EARLY = torch.tensor([[0, 5], [0, 7], [0, 6]])
NARROW: dict[str, Any] = {"window": 3}


@pytest.mark.parametrize("distance", ["kl", "cross_entropy"])
@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (attention(), state_space(), "softmax attention.*\n.*teacher softmax, student ssd"),
        (state_space(), attention(), "softmax attention.*\n.*teacher ssd, student softmax"),
        (attention(), attention(**NARROW), "a window of 3 in the student, of any length"),
        (attention(window=4), attention(**NARROW), "a window of 3 in the student, of 4"),
        (attention(causal=False), attention(), "a causal student"),
        (attention(), attention(valid_range=LATE), "starts later for the student"),
        (attention(causal=False), attention(causal=False, valid_range=EARLY), "stops earlier for the student"),
    ],
)
def test_pairs_whose_logarithms_are_infinite(teacher: Mixing, student: Mixing, message: str, distance: Any) -> None:
    with pytest.raises(UsageError, match=message):
        mixing_distance(student, teacher, distance=distance)
    assert bool(torch.isfinite(mixing_distance(student, teacher, distance="cosine", impl="streaming").total))


def test_pairs_that_only_look_infinite_have_a_distance() -> None:
    """A student's window as long as the sequence, and a late start where no row counts."""
    wide = mixing_distance(attention(seed=5, window=TIME), attention(), distance="kl", impl="streaming").total
    full = mixing_distance(attention(seed=5), attention(), distance="kl", impl="streaming").total
    torch.testing.assert_close(wide, full, rtol=1e-12, atol=0)
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[1:] = False
    late = mixing_distance(
        attention(seed=5, valid_range=LATE), attention(), distance="kl", mask=mask, impl="streaming"
    ).total
    alone = mixing_distance(attention(seed=5), attention(), distance="kl", mask=mask, impl="streaming").total
    torch.testing.assert_close(late, alone, rtol=1e-12, atol=0)


def test_kl_of_a_teacher_with_sinks() -> None:
    with pytest.raises(UsageError, match="do not sum to 1"):
        mixing_distance(attention(), attention(sinks=True), distance="kl")


@pytest.mark.parametrize("distance", ["kl", "cross_entropy"])
def test_panels_have_no_logarithms(distance: Any) -> None:
    with pytest.raises(UsageError, match="cannot run as 'panels': panels hold entries"):
        mixing_distance(attention(), attention(), distance=distance, impl="panels")


def test_kernels_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pair = [attention(seed=seed).map_factors(lambda factor: factor.detach().float()) for seed in (0, 5)]
    with pytest.raises(UsageError, match="cannot run as 'fused'"):
        mixing_distance(*pair, impl="fused")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_row_that_counts(impl: str) -> None:
    student = state_space(valid_range=torch.zeros(BATCH, 2, dtype=torch.int64))
    with pytest.raises(UsageError, match="no token is valid"):
        mixing_distance(student, attention(), distance="frobenius", impl=impl)
    found = mixing_distance(student, attention(), distance="frobenius", reduction="sum", impl=impl).total
    assert found.item() == 0
    found.backward()
    assert all(factor.grad is None or not bool(factor.grad.any()) for factor in student.factors.values())
    rows = mixing_distance(student, attention(), distance="frobenius", reduction="none", impl=impl).total
    assert rows.shape == (BATCH, TIME, 2) and not bool(rows.any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sequence_that_does_not_count_changes_nothing(impl: str) -> None:
    teacher, student = attention(), state_space(valid_range=torch.tensor([[0, TIME], [0, 0], [0, TIME]]))
    found = mixing_distance(student, teacher, distance="frobenius", impl=impl, seed=0)
    found.total.backward()
    kept = torch.tensor([0, 2])
    rows = mixing_distance(
        built(
            SSDMixing,
            {name: f.detach()[kept] if f.dim() > 1 else f for name, f in student.factors.items()},
            torch.float64,
            False,
        ),
        teacher.map_factors(lambda factor: factor.detach()[kept]),
        distance="frobenius",
        impl="reference",
    ).total
    margin = 0.0 if found.standard_error is None else 5 * float(found.standard_error)
    assert abs(found.total.item() - rows.item()) <= margin + 1e-12 * rows.item()
    for name, factor in student.factors.items():
        assert factor.grad is not None and bool(torch.isfinite(factor.grad).all())
        assert name == "D" or not bool(factor.grad[1].any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_factors_that_are_not_finite(side: str, value: float, impl: str) -> None:
    def spoil(factor: Tensor) -> Tensor:
        spoiled = factor.detach().clone()
        if factor.dim() == 4:
            spoiled[0, 3] = value
        return spoiled.requires_grad_()

    teacher, student = attention(), state_space()
    pair = (student, teacher.map_factors(spoil)) if side == "teacher" else (student.map_factors(spoil), teacher)
    with pytest.raises(NonFiniteLoss):
        mixing_distance(*pair, distance="frobenius", impl=impl)


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mapped", [False, True])
def test_logits_that_are_not_finite(mapped: bool, value: float, impl: str) -> None:
    student = attention(seed=5)
    key = student.factors["key"].detach().clone()
    key[1, 2] = value
    student = SoftmaxMixing(query=student.factors["query"].detach(), key=key.requires_grad_(), scale=0.5)
    with pytest.raises(NonFiniteLoss):
        mixing_distance(student, attention(), distance="kl", head_map=head_weights(2, 2) if mapped else None, impl=impl)


@pytest.mark.parametrize("impl", ["streaming", "panels", "sketch"])
def test_one_backward_and_no_second_derivative(impl: str) -> None:
    student = state_space()
    total = mixing_distance(student, attention(), distance="frobenius", impl=impl).total
    total.backward()
    with pytest.raises(UsageError, match="already used"):
        total.backward()
    total = mixing_distance(student, attention(), distance="frobenius", impl=impl).total
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(total, student.factors["dt"], create_graph=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled(Mixing):
    """A user's own mixing: M = diag(scale)."""

    kind: ClassVar[str] = "scaled"

    scale: Tensor

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.scale.shape[0]

    @property
    def time(self) -> int:
        """Number of tokens."""
        return self.scale.shape[1]

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.scale.shape[2]

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {"scale": self.scale}

    def _apply(self, values: Tensor) -> Tensor:
        return values * self.scale[..., None]

    def _block(self, rows: slice, columns: slice) -> Tensor:
        return torch.diag_embed(self.scale.transpose(1, 2))[:, :, rows, columns]


def test_a_mixing_of_ones_own_goes_by_panels() -> None:
    student = Scaled(scale=normal(3, BATCH, TIME, 2).requires_grad_())
    found = unsupported_reasons(student, attention())
    assert "streaming" in found and "panels" not in found
    with pytest.raises(UsageError, match="not made by themselves; impl='panels'"):
        mixing_distance(student, attention(), impl="streaming")
    exact = mixing_distance(student, attention(), impl="reference").total
    panels = mixing_distance(student, attention(), impl="panels").total
    torch.testing.assert_close(panels, exact, rtol=1e-12, atol=0)
    pair = [torch.autograd.grad(total, student.scale)[0] for total in (panels, exact)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-13)
