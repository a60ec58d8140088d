"""Row kernel of `linear_divergence` as an operator: memory, inputs that stay unchanged, torch.compile and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.kernels import linear_divergence as kernels
from xarch_kd.ops import divergences, linear_divergence
from xarch_kd.ops.dispatch import interpreted

DEVICE = "cpu" if interpreted() else "cuda"
# Three blocks of the interpreted kernel, the last not full.
VOCABULARY = 300
# A row as it is stored: whole vectors.
WIDTH = 320

OPTIONS: dict[str, Any] = {
    "vocabulary": VOCABULARY,
    "kind": "jsd",
    "share": 0.3,
    "factor": 1.0,
    "temperature": 2.0,
    "divergence_weight": 1.5,
    "cross_entropy_weight": 0.5,
    "student_scale": 1.0,
    "teacher_scale": 1.0,
    "student_cap": 20.0,
    "teacher_cap": 0.0,
    "gradient": torch.float32,
}


def _rows(seed: int, rows: int = 2, dtype: torch.dtype = torch.float32, padding: float = 0.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, WIDTH, generator=generator) * 3 for _ in range(2))
    student[:, VOCABULARY:] = padding
    teacher[:, VOCABULARY:] = padding
    return {
        "student": student.to(dtype).to(DEVICE),
        "teacher": teacher.to(dtype).to(DEVICE),
        "scale": torch.linspace(0.5, 1.5, rows, device=DEVICE),
        "labels": torch.arange(rows, device=DEVICE) * 149,
        "student_bias": None,
        "teacher_bias": None,
    }


def _call(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.divergence_rows(**inputs, **(OPTIONS | options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_gradient_is_the_wide_one_rounded(dtype: torch.dtype) -> None:
    """It is written at the start of the row that it is computed from, in half of its memory."""
    wide, packed = _rows(1), _rows(1)
    values = _call(wide)
    assert all(map(torch.equal, values, _call(packed, gradient=dtype)))
    found = kernels.gradient_view(packed["student"], dtype)
    assert found.data_ptr() == packed["student"].data_ptr()
    # The interpreter cuts where a GPU rounds.
    epsilon = torch.finfo(dtype)
    torch.testing.assert_close(found.float(), wide["student"], rtol=epsilon.eps, atol=epsilon.smallest_normal)


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e38])
def test_padded_columns_are_not_looked_at_and_get_zero(padding: float) -> None:
    clean, dirty = _rows(2, rows=1), _rows(2, rows=1, padding=padding)
    assert all(map(torch.equal, _call(clean), _call(dirty)))
    assert torch.equal(clean["student"], dirty["student"])
    assert not dirty["student"][:, VOCABULARY:].any()


def test_without_a_gradient_the_logits_stay_and_the_values_are_the_same() -> None:
    for kind in ("forward_kl", "jsd"):
        inputs, changed = _rows(3), _rows(3)
        before = inputs["student"].clone()
        divergence, cross_entropy, steepest = _call(inputs, kind=kind, gradient=None)
        assert torch.equal(inputs["student"], before)
        expected = _call(changed, kind=kind)
        torch.testing.assert_close(divergence, expected[0], rtol=1e-6, atol=0)
        assert torch.equal(cross_entropy, expected[1])
        assert steepest.shape == (0,)


@pytest.mark.parametrize("kind", [row.name for row in divergences.FORMULAS.values() if row.kernel is not None])
def test_steepest_is_the_largest_slope_of_the_divergence_alone(kind: str) -> None:
    """Not that of the cross-entropy, whatever scale, weight and softcap make of it."""
    inputs = _rows(4, rows=1)
    plain: dict[str, Any] = _rows(4, rows=1) | {"labels": None}
    _, _, found = _call(inputs, kind=kind, student_cap=0.0)
    assert torch.equal(found, _call(plain, kind=kind, student_cap=0.0)[2])
    slopes = plain["student"].abs().amax(-1) / plain["scale"] * (2.0 / 1.5)
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=0)


# numpy warns of 0 times infinity, whose result is replaced afterwards.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_teacher_may_rule_entries_out() -> None:
    """Logits of -inf, as a sampler leaves them: probability 0, whose terms are 0 where they have a limit."""
    for kind in ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha", "renyi"):
        inputs = _rows(5, rows=1)
        inputs["teacher"][:, 7:200] = -torch.inf
        nearly = _rows(5, rows=1)
        nearly["teacher"][:, 7:200] = -400.0
        found, expected = _call(inputs, kind=kind), _call(nearly, kind=kind)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(inputs["student"], nearly["student"])


def test_offsets_do_not_fit_in_32_bits() -> None:
    """The third row starts at element 2^31. Memory that is not touched is not there."""
    far = torch.empty(2**31 + WIDTH, dtype=torch.bfloat16, device=DEVICE).as_strided((3, WIDTH), (2**30, 1))
    inputs = _rows(6, rows=3, dtype=torch.bfloat16)
    far.copy_(inputs["student"])
    values = _call(inputs, gradient=torch.bfloat16)
    assert all(map(torch.equal, values, _call(inputs | {"student": far}, gradient=torch.bfloat16)))
    assert torch.equal(far, inputs["student"])


@pytest.mark.parametrize(("labelled", "gradient"), [(True, None), (False, torch.float32), (True, torch.bfloat16)])
def test_the_operator_keeps_what_it_tells_pytorch(labelled: bool, gradient: torch.dtype | None) -> None:
    inputs = _rows(7, rows=1)
    inputs["labels"] = inputs["labels"] if labelled else None
    torch.library.opcheck(torch.ops.xarch_kd.divergence_rows.default, (), inputs | OPTIONS | {"gradient": gradient})


def _step(hidden: Tensor, head: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    student = hidden @ head.T
    divergence, _, _ = _call(inputs | {"student": student}, gradient=torch.bfloat16)
    return divergence, kernels.gradient_view(student, torch.bfloat16).float() @ head


def test_a_compiled_graph_holds_the_operator_whole() -> None:
    inputs, generator = _rows(8), torch.Generator().manual_seed(9)
    hidden, head = (torch.randn(size, 4, generator=generator).to(DEVICE) for size in (2, WIDTH))
    compiled = torch.compile(_step, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(hidden, head, inputs), _step(hidden, head, inputs)))


# Where a graph goes on after a break, PyTorch looks at inputs and autograd functions in ways that it warns of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_loss_is_the_loss() -> None:
    generator = torch.Generator().manual_seed(10)
    hidden, head = (torch.randn(size, 4, generator=generator).to(DEVICE) for size in (3, 150))

    def loss(leaf: Tensor) -> Tensor:
        return linear_divergence(leaf, head, hidden, head, divergence="reverse_kl", impl="fused").total

    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        value = run(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    assert all(map(torch.equal, *results))
