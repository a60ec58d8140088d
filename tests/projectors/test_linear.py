"""Projectors of every kind: initialization, number of parameters, and equality of `split` and `forward`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from xarch_kd.errors import UsageError
from xarch_kd.losses.features import feature_loss
from xarch_kd.projectors import (
    LinearProjector,
    LowRankProjector,
    MLPProjector,
    OrthogonalProjector,
    Projector,
    build_projector,
    parameter_count,
)

# Kind, student dim, teacher dim, options, and the names of its parameters.
SPECIMENS: list[tuple[str, int, int, dict[str, Any], set[str]]] = [
    ("identity", 6, 6, {}, set()),
    ("linear", 6, 9, {"bias": True}, {"weight", "bias"}),
    ("linear", 9, 6, {}, {"weight"}),
    ("low_rank", 6, 9, {"rank": 2, "bias": True}, {"down", "up", "bias"}),
    ("mlp", 6, 9, {"hidden": 7, "bias": True}, {"inner", "inner_bias", "outer", "bias"}),
    ("orthogonal", 6, 9, {"bias": True}, {"basis", "bias"}),
    ("orthogonal", 9, 6, {}, {"basis"}),
]
# Of a QR factor or of products of a few numbers in float32: some roundings.
ROUNDING = 2e-6


def made(kind: str, student: int, teacher: int, options: dict[str, Any], seed: int = 0) -> Projector:
    """Return a projector with all parameters perturbed, so that no initialization is special."""
    generator = torch.Generator().manual_seed(seed)
    projector = build_projector(kind, student, teacher, generator=generator, **options)
    assert projector is not None
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return projector


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_auto_is_linear_only_where_dims_differ() -> None:
    assert build_projector("auto", 8, 8) is None
    assert build_projector("none", 8, 8) is None
    for projector in (build_projector("auto", 6, 8), build_projector("linear", 6, 8)):
        assert isinstance(projector, LinearProjector)
        assert projector.weight.shape == (8, 6) and projector.bias is None
    same = build_projector("linear", 8, 8)
    assert isinstance(same, LinearProjector) and torch.equal(same.weight, torch.eye(8))


@pytest.mark.parametrize("kind", ["linear", "low_rank", "mlp", "orthogonal"])
def test_it_starts_as_an_isometry_drawn_from_the_generator(kind: str) -> None:
    rank = 6 if kind == "low_rank" else None
    wide, again, other = (
        build_projector(kind, 6, 9, generator=torch.Generator().manual_seed(seed), rank=rank) for seed in (1, 1, 2)
    )
    assert wide is not None and again is not None and other is not None
    torch.testing.assert_close(wide.matrix().T @ wide.matrix(), torch.eye(6), rtol=0, atol=ROUNDING)
    assert torch.equal(wide.matrix(), again.matrix()) and not torch.equal(wide.matrix(), other.matrix())
    # The MLP too: its units come in pairs that are linear, however large the features.
    features = 100 * normal(5, 6)
    torch.testing.assert_close(wide(features), features @ wide.matrix().T, rtol=0, atol=100 * ROUNDING)


@pytest.mark.parametrize(("kind", "student", "teacher", "options", "names"), SPECIMENS)
def test_objectives_see_the_dense_projection(
    kind: str, student: int, teacher: int, options: dict[str, Any], names: set[str]
) -> None:
    """Values and gradients of the loss by `split` against the formula of `forward`, both in float64."""
    projector = made(kind, student, teacher, options).double()
    target = normal(2, 5, teacher, seed=2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    results = []
    for dense in (True, False):
        features = normal(2, 5, student, seed=1, dtype=torch.float64).requires_grad_()
        if dense:
            loss = (projector(features) - target)[mask].square().mean(1).sum() / 7
        else:
            loss = feature_loss("mse", features, target, normalizer=7.0, mask=mask, projector=projector)
        results.append((loss, *torch.autograd.grad(loss, (features, *projector.parameters()))))
    for dense, streamed in zip(*results, strict=True):
        torch.testing.assert_close(streamed, dense, rtol=1e-10, atol=1e-12)
    assert {name for name, _ in projector.named_parameters()} == names


@pytest.mark.parametrize(("kind", "student", "teacher", "options", "names"), SPECIMENS)
def test_forward_is_its_formula(
    kind: str, student: int, teacher: int, options: dict[str, Any], names: set[str]
) -> None:
    projector = made(kind, student, teacher, options)
    x = normal(2, 3, student, seed=1)
    if isinstance(projector, LowRankProjector):
        expected = x @ projector.down.T @ projector.up.T
    elif isinstance(projector, MLPProjector):
        expected = functional.silu(x @ projector.inner.T + projector.inner_bias) @ projector.outer.T
    elif isinstance(projector, LinearProjector | OrthogonalProjector):
        expected = x @ projector.weight.T
    else:
        expected = x
    if "bias" in names:
        expected = expected + projector.get_parameter("bias")
    torch.testing.assert_close(projector(x), expected, rtol=1e-5, atol=1e-5)
    slope = torch.func.jacrev(projector)(torch.zeros(student))
    torch.testing.assert_close(projector.matrix(), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "student", "teacher", "options", "names"), SPECIMENS)
def test_it_is_saved_and_read_under_stable_names(
    kind: str, student: int, teacher: int, options: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    projector, other = made(kind, student, teacher, options), made(kind, student, teacher, options, seed=9)
    save_file(projector.state_dict(), tmp_path / "projector.safetensors")
    stored = load_file(tmp_path / "projector.safetensors")
    assert set(stored) == names
    other.load_state_dict(stored)
    x = normal(4, student)
    assert torch.equal(projector(x), other(x))
    assert sum(p.numel() for p in projector.parameters()) == parameter_count(kind, student, teacher, **options)


@pytest.mark.parametrize("dims", [(6, 9), (9, 6), (6, 6)])
def test_orthogonal_stays_orthogonal_while_it_trains(dims: tuple[int, int]) -> None:
    projector = build_projector("orthogonal", *dims, generator=torch.Generator().manual_seed(0))
    assert isinstance(projector, OrthogonalProjector)
    start, smaller = projector.matrix().clone(), min(dims)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.1, weight_decay=0.1)
    x, y = normal(50, dims[0]), normal(50, dims[1], seed=1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = feature_loss("mse", x, y, normalizer=50.0, projector=projector)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weight = projector.matrix()
        product = weight @ weight.T if dims[0] > dims[1] else weight.T @ weight
        torch.testing.assert_close(product, torch.eye(smaller), rtol=0, atol=ROUNDING)
    assert losses[-1] < 0.95 * losses[0]
    assert (projector.matrix() - start).abs().max() > 0.1


def test_orthogonal_takes_any_semi_orthogonal_weight_and_no_other() -> None:
    projector = build_projector("orthogonal", 4, 4)
    assert projector is not None
    # A reflection: its QR factor has a sign to be put right.
    reflection = torch.eye(4)[[1, 0, 3, 2]] * torch.tensor([1.0, -1.0, -1.0, -1.0])
    projector.set_linear_map(reflection)
    torch.testing.assert_close(projector.matrix(), reflection, rtol=0, atol=ROUNDING)
    with pytest.raises(UsageError, match="semi-orthogonal weight"):
        projector.set_linear_map(2 * torch.eye(4))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("none", 6, 8), {}, "student 6, teacher 8"),
        (("identity", 6, 8), {}, "student 6, teacher 8"),
        (("liner", 6, 8), {}, "Did you mean 'linear'"),
        (("low_rank", 6, 8), {"rank": 7}, "1 to 6"),
        (("low_rank", 6, 8), {"rank": 0}, "1 to 6"),
        (("mlp", 6, 8), {"hidden": 1}, ">= 2"),
        (("linear", 6, 8), {"rank": 2}, "no rank"),
        (("auto", 6, 8), {"hidden": 2}, "no hidden"),
        (("identity", 6, 6), {"bias": True}, "no bias"),
    ],
)
def test_what_is_refused(arguments: tuple[str, int, int], options: dict[str, Any], message: str) -> None:
    for function in (build_projector, parameter_count):
        with pytest.raises(UsageError, match=message):
            function(*arguments, **options)
