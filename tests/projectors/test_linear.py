"""Linear projectors: kinds, starting points and the closed-form fit."""

from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.projectors import LinearProjector, build_projector, ridge


def test_auto_is_linear_only_where_widths_differ() -> None:
    assert build_projector("auto", 8, 8) is None
    assert build_projector("none", 8, 8) is None
    for projector in (build_projector("auto", 6, 8), build_projector("linear", 6, 8)):
        assert projector is not None
        assert projector.weight.shape == (8, 6) and projector.bias is None
    same = build_projector("linear", 8, 8)
    assert same is not None and torch.equal(same.weight, torch.eye(8))


def test_it_starts_as_an_isometry_drawn_from_the_generator() -> None:
    wide = LinearProjector(6, 9, generator=torch.Generator().manual_seed(1))
    again = LinearProjector(6, 9, generator=torch.Generator().manual_seed(1))
    other = LinearProjector(6, 9, generator=torch.Generator().manual_seed(2))
    # Orthogonality of a QR factor in float32: a few roundings.
    torch.testing.assert_close(wide.weight.T @ wide.weight, torch.eye(6), rtol=0, atol=1e-6)
    assert torch.equal(wide.weight, again.weight) and not torch.equal(wide.weight, other.weight)


def test_forward_is_the_map_that_objectives_read() -> None:
    projector = LinearProjector(6, 9, bias=True)
    assert projector.bias is not None
    with torch.no_grad():
        projector.bias.normal_(generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(projector(features), features @ projector.weight.T + projector.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_fit_finds_a_linear_teacher_and_leaves_masked_tokens_out(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(9, 6, generator=generator)
    student = torch.randn(4, 50, 6, generator=generator) + (1.0 if bias else 0.0)
    teacher = student @ truth.T + (0.5 if bias else 0.0)
    mask = torch.rand(4, 50, generator=generator) < 0.8
    teacher[~mask] = float("nan")
    projector = LinearProjector(6, 9, bias=bias)
    projector.fit(student, teacher, mask, penalty=1e-9)
    torch.testing.assert_close(projector.weight.detach(), truth, rtol=0, atol=1e-5)
    if projector.bias is not None:
        torch.testing.assert_close(projector.bias.detach(), torch.full((9,), 0.5), rtol=0, atol=1e-5)


def test_ridge_is_where_the_gradient_of_its_objective_vanishes() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    weight, offset = ridge(student, teacher, penalty=0.1)
    assert offset is None
    weight.requires_grad_()
    strength = 0.1 * student.square().sum() / student.numel()
    ((student @ weight.T - teacher).square().sum() / 40 + strength * weight.square().sum()).backward()
    assert weight.grad is not None and weight.grad.abs().max() < 1e-12


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="student 6, teacher 8"):
        build_projector("none", 6, 8)
    with pytest.raises(UsageError, match="Did you mean 'linear'"):
        build_projector("liner", 6, 8)
    with pytest.raises(UsageError, match="matching rows"):
        ridge(torch.ones(3, 2), torch.ones(4, 2))
