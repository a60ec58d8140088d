"""Automatic weights: gradients of equal norm on the student, one backward pass per part, a saved state."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xarch_kd.errors import CheckpointError, NonFiniteLoss, UsageError
from xarch_kd.losses.balance import LARGEST_SCALE, Balance, gradient_norm, observed_loss
from xarch_kd.losses.features import feature_loss
from xarch_kd.losses.relations import gram_loss


class Toy:
    """A student of two layers, a projector, and two or three objectives of very different size."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)).double()
        self.projector = nn.Linear(6, 8).double()
        self.inputs, self.teacher = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 8).double()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters()]

    def parts(self) -> dict[str, Tensor]:
        """The second and third allow one backward."""
        features = self.student(self.inputs)
        match = feature_loss("mse", self.projector(features) * 5, self.teacher, normalizer=8.0)
        return {"tokens": features.square().mean(), "match": match, "gram": self.gram(features)}

    def gram(self, features: Tensor) -> Tensor:
        return gram_loss(features, self.teacher, normalizer=8.0)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        trained = [*self.parameters, *self.projector.parameters()]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def test_gradients_on_the_student_are_equal_in_norm_after_scaling() -> None:
    toy = Toy()
    balance = Balance(anchor="tokens", parts=("match", "gram"), observations=1)
    _, balance = observed_loss(toy.parts(), balance, toy.parameters, [*toy.projector.parameters()])
    assert balance.done
    count = len(toy.parameters)
    norms = {name: gradient_norm(toy.gradients(toy.parts()[name])[:count]) for name in ("tokens", "match", "gram")}
    assert max(norms.values()) > 10 * min(norms.values())
    for name, norm in norms.items():
        assert norm * balance.scale(name) == pytest.approx(norms["tokens"], rel=1e-6)


def test_the_loss_hands_the_scaled_sum_to_every_parameter() -> None:
    toy, weights = Toy(), {"match": 0.5, "gram": 2.0}
    balance = Balance(anchor="tokens", parts=("match",), observations=2)
    loss, after = observed_loss(toy.parts(), balance, toy.parameters, [*toy.projector.parameters()], weights=weights)
    assert after != balance and not after.done and balance.ratios == {}
    factors = {"tokens": 1.0, "match": 0.5 * after.scale("match"), "gram": 2.0}
    parts = toy.parts()
    expected = torch.stack([factor * parts[name] for name, factor in factors.items()]).sum()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-13, atol=0)
    for found, wanted in zip(toy.gradients(3 * loss), toy.gradients(3 * expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_the_graph_of_the_parts_is_let_go() -> None:
    toy = Toy()
    parts = toy.parts()
    observed_loss(parts, Balance(anchor="match", parts=("tokens",)), toy.parameters)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(parts["tokens"], toy.parameters)


def test_an_accumulating_optimizer_sees_it_as_any_loss() -> None:
    toy = Toy()
    balance = Balance(anchor="tokens", parts=("match",))
    for _ in range(2):
        loss, balance = observed_loss(toy.parts(), balance, toy.parameters)
        loss.backward()
    assert all(p.grad is not None for p in toy.parameters) and all(p.grad is None for p in toy.projector.parameters())
    first, second = (
        gradient.clone() for gradient in (toy.parameters[0].grad, toy.parameters[2].grad) if gradient is not None
    )
    for p in toy.parameters:
        p.grad = None
    loss, _ = observed_loss(toy.parts(), balance, toy.parameters)
    (2 * loss).backward()
    torch.testing.assert_close(toy.parameters[0].grad, first, rtol=1e-6, atol=0)
    torch.testing.assert_close(toy.parameters[2].grad, second, rtol=1e-6, atol=0)


def test_the_scale_is_the_geometric_mean_of_the_first_observations() -> None:
    balance = Balance(anchor="a", parts=("b", "c"), observations=2)
    assert balance.scales == {"b": 1.0, "c": 1.0}
    for norms in ({"a": 2.0, "b": 1.0, "c": 4.0}, {"a": 8.0, "b": 1.0, "c": 4.0}, {"a": 1e6, "b": 1.0, "c": 1.0}):
        balance = balance.observe(norms)
    assert balance.done
    assert balance.scales == pytest.approx({"b": math.sqrt(2 * 8), "c": math.sqrt(0.5 * 2)})


def test_gradients_of_zero_say_nothing_and_scales_have_a_limit() -> None:
    balance = Balance(anchor="a", parts=("b",), observations=1)
    for norms in ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0}, {"b": 1.0}):
        balance = balance.observe(norms)
    assert not balance.done and balance.scale("b") == 1
    assert balance.observe({"a": 1e9, "b": 1e-9}).scale("b") == pytest.approx(LARGEST_SCALE)
    assert balance.observe({"a": 1e-9, "b": 1e9}).scale("b") == pytest.approx(1 / LARGEST_SCALE)


def test_parts_without_a_gradient_are_added_and_not_observed() -> None:
    toy = Toy()
    parts = toy.parts() | {"match": torch.tensor(3.0).double()}
    loss, balance = observed_loss(parts, Balance(anchor="tokens", parts=("match",)), toy.parameters)
    assert balance.ratios == {} and float(loss.detach()) == pytest.approx(
        float(sum(part.detach() for part in parts.values()))
    )
    nothing = {name: part.detach() for name, part in toy.parts().items()}
    assert not observed_loss(nothing, balance, toy.parameters)[0].requires_grad


def test_the_state_comes_back_through_json() -> None:
    balance = Balance(anchor="a", parts=("b", "c"), observations=3).observe({"a": 3.0, "b": 0.7, "c": 1e-5})
    state = json.loads(json.dumps(balance.state()))
    assert state["scales"] == balance.scales
    again = Balance(anchor="a", parts=("b", "c"), observations=3).load(state)
    assert again == balance and again.scales == balance.scales
    assert again.observe({"a": 1.0, "b": 2.0, "c": 1.0}) == balance.observe({"a": 1.0, "b": 2.0, "c": 1.0})


@pytest.mark.parametrize("other", [{"anchor": "z"}, {"parts": ("b",)}, {"observations": 4}])
def test_the_state_of_another_stage_is_refused(other: dict[str, Any]) -> None:
    options: dict[str, Any] = {"anchor": "a", "parts": ("b", "c"), "observations": 3}
    with pytest.raises(CheckpointError, match="another stage"):
        Balance(**(options | other)).load(Balance(**options).state())


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match="one step or more"):
        Balance(anchor="a", parts=("b",), observations=0)
    for parts in (("a",), ("b", "b")):
        with pytest.raises(UsageError, match="must differ"):
            Balance(anchor="a", parts=parts)
    with pytest.raises(NonFiniteLoss, match="objective b"):
        Balance(anchor="a", parts=("b",)).observe({"a": 1.0, "b": float("nan")})
    with pytest.raises(UsageError, match="is missing"):
        observed_loss(Toy().parts(), Balance(anchor="a", parts=("gram",)), [])
