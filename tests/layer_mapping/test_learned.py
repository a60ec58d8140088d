from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import LayerMap, LearnedMap, explicit
from xarch_kd.layer_mapping.counts import uniform


def random_losses(students: int, teachers: int) -> Tensor:
    return 0.5 + torch.rand(students, teachers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(learned: LearnedMap, losses: Tensor, steps: int = 150) -> LayerMap:
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        learned(losses, step / steps).map.backward()
        optimizer.step()
    return learned.layer_map(1.0)


def test_all_layers_are_equal_at_the_start() -> None:
    learned = LearnedMap(3, 5)
    assert torch.equal(learned.weights(0.3), torch.full((3, 5), 0.2))
    assert learned.layer_map(0.3).strategy == "learned"
    assert list(learned.state_dict()) == ["logits"]


def test_the_student_and_the_map_have_gradients_of_their_own() -> None:
    learned = LearnedMap(2, 3, initial=explicit([(0, 0), (1, 2)], 2, 3))
    losses = random_losses(2, 3).requires_grad_()
    match, objective = learned(losses, 0.0)
    assert match.shape == (2,) and objective.shape == ()
    match.sum().backward(retain_graph=True)
    assert losses.grad is not None and learned.logits.grad is None
    torch.testing.assert_close(losses.grad, learned.weights(0.0).detach().double())
    losses.grad = None
    objective.backward()
    assert losses.grad is None and learned.logits.grad is not None and bool((learned.logits.grad != 0).all())


def test_the_match_is_the_weighted_sum_of_losses() -> None:
    learned = LearnedMap(2, 2, initial=explicit([(0, 0), (0, 1), (1, 1)], 2, 2))
    match = learned(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), 0.0).student
    # An initial map leaves a tenth to all layers: (0.5, 0.5) and (0.05, 0.95).
    torch.testing.assert_close(match, torch.tensor([2.0, 0.05 * 5 + 0.95 * 7]))


def test_temperature_falls_geometrically_and_rows_end_near_one_hot() -> None:
    learned = LearnedMap(4, 6, temperature=2.0, final_temperature=0.02)
    assert [learned.temperature(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 0.2, 0.02])
    found = trained(learned, random_losses(4, 6))
    assert found.weights.max(1).values.min().item() > 0.99
    assert LearnedMap(4, 6, temperature=2.0).temperature(1.0) == 2.0


def test_training_finds_the_pairs_that_match_best() -> None:
    losses = torch.ones(4, 6, dtype=torch.float64)
    right = [1, 2, 4, 5]
    losses[range(4), right] = 0.2
    found = trained(LearnedMap(4, 6, final_temperature=0.05), losses)
    assert found.weights.argmax(1).tolist() == right
    assert found.collapsed() is None


def test_a_teacher_layer_that_is_easy_for_all_does_not_draw_the_map() -> None:
    losses = torch.ones(4, 6, dtype=torch.float64)
    right = [1, 2, 4, 5]
    losses[range(4), right] = 0.2
    losses[:, 0] = 1e-3
    found = trained(LearnedMap(4, 6, final_temperature=0.05, usage_floor=0.0), losses)
    assert found.weights.argmax(1).tolist() == right


def test_the_floor_of_entropy_holds_a_collapsed_map_up() -> None:
    flat = torch.ones(4, 6, dtype=torch.float64)
    collapsed = explicit([(student, 3) for student in range(4)], 4, 6)
    free, held = (LearnedMap(4, 6, initial=collapsed, usage_floor=floor) for floor in (0.0, 0.5))
    assert free.layer_map(0.0).collapsed() is not None
    # Equal losses: only the floor has a gradient. The rows are (0.9 + 0.1/6, 0.1/6 × 5).
    entropy = -((0.9 + 0.1 / 6) * math.log(0.9 + 0.1 / 6) + 5 * 0.1 / 6 * math.log(0.1 / 6))
    difference = held(flat, 0.0).map - free(flat, 0.0).map
    # Weights are float32, of about 24 terms.
    assert difference.item() == pytest.approx(0.5 * math.log(4) - entropy, abs=1e-5)
    assert trained(free, flat, steps=60).collapsed() is not None
    assert trained(held, flat, steps=60).collapsed() is None


def test_gradients_are_finite_when_rows_are_one_hot_to_the_last_digit() -> None:
    learned = LearnedMap(3, 4, temperature=1e-3)
    with torch.no_grad():
        learned.logits[:, 1] = 5.0
    assert learned.weights(0.0)[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    learned(random_losses(3, 4).float(), 0.0).map.backward()
    assert learned.logits.grad is not None and bool(torch.isfinite(learned.logits.grad).all())


def test_losses_of_zero_have_finite_gradients() -> None:
    learned = LearnedMap(2, 2)
    learned(torch.zeros(2, 2), 0.0).map.backward()
    assert learned.logits.grad is not None and bool(torch.isfinite(learned.logits.grad).all())


def test_a_start_from_a_map_keeps_it_at_any_temperature() -> None:
    start = uniform(3, 6)
    for temperature in (0.5, 2.0):
        learned = LearnedMap(3, 6, temperature=temperature, initial=start)
        expected = 0.9 * start.weights + 0.1 / 6
        # Logits are float32.
        torch.testing.assert_close(learned.layer_map(0.0).weights, expected, atol=1e-6, rtol=0)
    unmatched = LearnedMap(3, 6, initial=explicit([(0, 1)], 3, 6)).layer_map(0.0)
    assert unmatched.weights[2].tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedMap(0, 3), "at least one layer"),
        (lambda: LearnedMap(2, 3, temperature=0.0), r"temperature of learned[\s\S]*> 0"),
        (lambda: LearnedMap(2, 3, final_temperature=-1.0), "final_temperature of learned"),
        (lambda: LearnedMap(2, 3, usage_floor=1.5), r"usage_floor[\s\S]*0 to 1"),
        (lambda: LearnedMap(2, 3, initial=uniform(2, 4)), r"starts from does not fit[\s\S]*\[2, 4\][\s\S]*\[2, 3\]"),
        (lambda: LearnedMap(2, 3).weights(1.5), r"progress[\s\S]*1.5[\s\S]*0 to 1"),
        (lambda: LearnedMap(2, 3)(torch.zeros(3, 2), 0.0), r"losses[\s\S]*\[3, 2\][\s\S]*\[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
