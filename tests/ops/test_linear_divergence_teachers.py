"""Teachers given as logits or as their likeliest entries and a tail, against formulas reimplemented in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.flat import flat_divergence
from xarch_kd.errors import NonFiniteLoss, UsageError
from xarch_kd.ops import TeacherTopK

IMPLEMENTATIONS = ("reference", "streaming")
TOKENS, VOCABULARY, WIDTH, NAMED, TEMPERATURE = (3, 7), 53, 8, 6, 1.5
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl",
    "reverse_kl",
    {"kind": "jsd", "beta": 0.3},
    {"kind": "skew_forward_kl", "alpha": 0.2},
    {"kind": "skew_reverse_kl", "alpha": 0.2},
    "total_variation",
    {"kind": "alpha", "alpha": 0.4},
    {"kind": "renyi", "alpha": 1.5},
)


def divergence_of(divergence: Any, p: Tensor, q: Tensor) -> Tensor:
    """Return D(p, q) over the last axis, straight from probabilities."""
    kind = divergence if isinstance(divergence, str) else divergence["kind"]
    if kind == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    if kind == "jsd":
        m = 0.3 * p + 0.7 * q
        return (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1)
    if kind == "skew_forward_kl":
        return (p * (p / (0.2 * p + 0.8 * q)).log()).sum(-1)
    if kind == "skew_reverse_kl":
        return (q * (q / (0.2 * q + 0.8 * p)).log()).sum(-1)
    if kind == "total_variation":
        return 0.5 * (p - q).abs().sum(-1)
    if kind == "alpha":
        return ((p**0.4 * q**0.6).sum(-1) - 1) / (0.4 * -0.6)
    return (p**1.5 / q**0.5).sum(-1).log() / 0.5


def buckets(probabilities: Tensor, indices: Tensor) -> Tensor:
    """Return the probabilities at `indices` and, last, the sum of all others."""
    named = probabilities.gather(-1, indices)
    others = torch.ones_like(probabilities).scatter(-1, indices, 0.0)
    return torch.cat([named, (probabilities * others).sum(-1, keepdim=True)], -1)


def make(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return student hidden states and weight, which train, and the teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((*TOKENS, WIDTH), (VOCABULARY, WIDTH), (*TOKENS, VOCABULARY))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), 2 * logits


def options() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    labels[1, 2] = labels[2, 6] = -100
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64) + 0.1
    return {
        "labels": labels,
        "token_weights": weights,
        "cross_entropy": 0.4,
        "divergence_weight": 0.8,
        "student_softcap": 4.0,
        "student_scale": 0.9,
        "temperature": TEMPERATURE,
    }


def expected(hidden: Tensor, weight: Tensor, rows: Any) -> Tensor:
    """Return the total that `options` describe; `rows` gives the divergence from the student's probabilities."""
    given = options()
    z = 4 * torch.tanh(0.9 * torch.einsum("btd,vd->btv", hidden, weight) / 4)
    labels, w = given["labels"], torch.where(given["labels"] != -100, given["token_weights"], 0.0)
    cross = -z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return ((0.8 * rows((z / TEMPERATURE).softmax(-1)) + 0.4 * cross) * w).sum() / w.sum()


def assert_same(ours: tuple[Tensor, Tensor, Tensor], total: Tensor, theirs: list[Tensor], wanted: Tensor) -> None:
    """float64 with a few hundred operations an entry: 1e-11 is four digits above its rounding."""
    total.backward()
    wanted.backward()
    torch.testing.assert_close(total, wanted, rtol=1e-11, atol=1e-13)
    for mine, other in zip(ours[:2], theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_given_as_logits(divergence: Any, impl: str) -> None:
    """A teacher with five more columns than the student has rows, which are padding."""
    ours, theirs = make(), make()
    padded = torch.cat([ours[2], torch.full((*TOKENS, 5), 9.0, dtype=torch.float64)], -1)
    total = flat_divergence(
        *ours[:2], teacher_logits=padded, divergence=divergence, impl=impl, chunk_size=4, **options()
    ).total
    p = (theirs[2] / TEMPERATURE).softmax(-1)
    wanted = expected(*theirs[:2], lambda q: divergence_of(divergence, p, q))
    assert_same(ours, total, list(theirs[:2]), wanted)
    assert torch.equal(padded[..., :VOCABULARY], theirs[2]), "the teacher's logits are left as they are"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_given_as_top_k_is_compared_by_buckets(divergence: Any, impl: str) -> None:
    ours, theirs = make(), make()
    top = TeacherTopK.from_logits(ours[2], NAMED, temperature=TEMPERATURE)
    total = flat_divergence(
        *ours[:2], teacher_top_k=top, divergence=divergence, impl=impl, chunk_size=4, **options()
    ).total
    p = buckets((theirs[2] / TEMPERATURE).softmax(-1), top.indices)
    wanted = expected(*theirs[:2], lambda q: divergence_of(divergence, p, buckets(q, top.indices)))
    assert_same(ours, total, list(theirs[:2]), wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_top_k_is_a_lower_bound_that_grows_with_k(divergence: Any) -> None:
    hidden, weight, logits = make()
    full = flat_divergence(hidden, weight, teacher_logits=logits, divergence=divergence, reduction="none").total
    previous = torch.zeros(TOKENS, dtype=torch.float64)
    for k in (1, 5, 20, VOCABULARY - 1):
        top = TeacherTopK.from_logits(logits, k)
        rows = flat_divergence(hidden, weight, teacher_top_k=top, divergence=divergence, reduction="none").total
        assert bool((rows >= previous - 1e-12).all()) and bool((rows <= full + 1e-12).all())
        previous = rows
    # All but one entry named: the tail is that entry, so nothing is merged.
    torch.testing.assert_close(previous, full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_teacher_without_a_tail_stays_finite(impl: str) -> None:
    """The named entries have all of the mass: the tail counts as float32's rounding of 1, 2⁻²³."""
    hidden, weight, _ = make(torch.float32)
    top = TeacherTopK(
        indices=torch.tensor([3, 40]).expand(*TOKENS, 2),
        log_probabilities=torch.tensor([0.75, 0.25]).log().expand(*TOKENS, 2),
    )
    q = buckets(torch.einsum("btd,vd->btv", hidden, weight).double().softmax(-1), top.indices)
    p = torch.tensor([0.75, 0.25, 2.0**-23], dtype=torch.float64)
    for divergence in ("forward_kl", "reverse_kl", {"kind": "jsd", "beta": 0.3}):
        found = flat_divergence(hidden, weight, teacher_top_k=top, divergence=divergence, impl=impl).total
        # The buckets' sum is 1 + 2⁻²³, which is divided out.
        wanted = divergence_of(divergence, p / p.sum(), q).mean()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_student_without_a_tail_keeps_its_gradient(impl: str) -> None:
    """Logits of the tail 200 below: its probabilities are 0 in float32, their logarithm is not."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.full((5, 1), -200.0)
    weight[:2] = torch.tensor([[0.0], [0.5]])
    top = TeacherTopK(indices=torch.tensor([[0, 1]]), log_probabilities=torch.tensor([[0.4, 0.4]]).log())
    total = flat_divergence(hidden, weight, teacher_top_k=top, impl=impl).total
    z = weight.double().view(-1)
    log_q = z.log_softmax(0)
    log_b = torch.cat([log_q[:2], log_q[2:].logsumexp(0, keepdim=True)])
    p = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    torch.testing.assert_close(total.double(), (p * (p.log() - log_b)).sum(), rtol=1e-5, atol=0)
    total.backward()
    assert hidden.grad is not None
    # ∂D/∂hidden = Σ_v z_v ∂D/∂z_v: z_named (q - p) and, for the tail, -200 (q_tail - p_tail) = 40.
    wanted = 0.5 * (log_b[1].exp() - 0.4) + 40.0
    torch.testing.assert_close(hidden.grad.double().squeeze(), wanted, rtol=1e-5, atol=0)


def relative_errors(form: str, dtype: torch.dtype, impl: str, divergence: Any) -> list[float]:
    results = []
    base = make(dtype)
    for kind, how in ((dtype, impl), (torch.float64, "reference")):
        hidden, weight = (tensor.detach().to(kind).requires_grad_() for tensor in base[:2])
        logits = base[2].to(kind)
        top = TeacherTopK.from_logits(base[2], NAMED)
        top = replace(top, log_probabilities=top.log_probabilities.to(dtype).to(kind))
        given: dict[str, Any] = {"teacher_logits": logits} if form == "logits" else {"teacher_top_k": top}
        total = flat_divergence(hidden, weight, **given, divergence=divergence, impl=how, chunk_size=5).total
        total.backward()
        results.append([total.detach(), hidden.grad, weight.grad])
    return [float((mine.double() - true).abs().max() / true.abs().max()) for mine, true in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["logits", "top_k"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_error_is_within_the_budget_of_the_dense_form(divergence: Any, form: str, dtype: torch.dtype) -> None:
    """Streamed error against float64 <= 4 x the dense form's + one rounding of the result, of float32 64 of them."""
    dense = relative_errors(form, dtype, "reference", divergence)
    streamed = relative_errors(form, dtype, "streaming", divergence)
    single = 64 * torch.finfo(torch.float32).eps
    bands = [single] + [max(single, torch.finfo(dtype).eps)] * 2
    for mine, theirs, band in zip(streamed, dense, bands, strict=True):
        assert mine <= 4 * theirs + band


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_a_masked_token_names_does_not_matter(impl: str) -> None:
    hidden, weight, logits = make()
    top = TeacherTopK.from_logits(logits, NAMED)
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[1, 3] = False
    wanted = flat_divergence(hidden, weight, teacher_top_k=top, mask=mask, impl=impl).total
    top.indices[1, 3], top.log_probabilities[1, 3], logits[1, 3] = -7, float("nan"), float("nan")
    assert torch.equal(flat_divergence(hidden, weight, teacher_top_k=top, mask=mask, impl=impl).total, wanted)
    assert torch.isfinite(flat_divergence(hidden, weight, teacher_logits=logits, mask=mask, impl=impl).total)


def top_k(indices: Any = None, probabilities: Any = None) -> TeacherTopK:
    named = torch.tensor([0, 1]) if indices is None else torch.as_tensor(indices)
    log_p = (torch.tensor([0.5, 0.3]) if probabilities is None else torch.as_tensor(probabilities)).log()
    return TeacherTopK(indices=named.expand(*TOKENS, -1), log_probabilities=log_p.expand(*TOKENS, -1))


FULL = torch.full((VOCABULARY,), 1 / VOCABULARY)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher_hidden": torch.zeros(*TOKENS, 4)}, ["teacher_head is missing", "TeacherLogits(tensor)"]),
        ({"teacher_hidden": [[0.0]]}, ["in no known form", "list", "TeacherLogits | TeacherTopK"]),
        (
            {"teacher_top_k": top_k(), "teacher_weight": torch.zeros(VOCABULARY, 4)},
            ["given as TeacherTopK takes no teacher_head"],
        ),
        (
            {"teacher_logits": torch.zeros(*TOKENS, VOCABULARY), "teacher_weight": torch.zeros(VOCABULARY, 4)},
            ["given as TeacherLogits takes no teacher_head", "to the logits"],
        ),
        ({"teacher_logits": torch.zeros(3, 6, VOCABULARY)}, ["teacher.values", "[3, 6, 53]", "[3, 7, 53]"]),
        ({"teacher_logits": torch.zeros(())}, ["teacher.values", "[]"]),
        ({"teacher_logits": torch.zeros(*TOKENS, VOCABULARY, dtype=torch.long)}, ["teacher.values", "floating point"]),
        (
            {"teacher_logits": torch.zeros(*TOKENS, VOCABULARY + 1025)},
            ["more than padding", "53 student", "vocabulary="],
        ),
        ({"teacher_logits": torch.zeros(*TOKENS, 40), "vocabulary": 41}, ["41", "40 teacher rows"]),
        (
            {"teacher_logits": torch.zeros(*TOKENS, VOCABULARY, device="meta")},
            ["different devices", "teacher.values on meta"],
        ),
        ({"teacher_top_k": top_k([0, VOCABULARY])}, ["is outside the vocabulary that is compared", "53", "0 to 52"]),
        ({"teacher_top_k": top_k([0, -1])}, ["is outside the vocabulary that is compared", "-1"]),
        (
            {"teacher_top_k": top_k([0, 30]), "vocabulary": 30},
            ["is outside the vocabulary that is compared", "30", "0 to 29"],
        ),
        ({"teacher_top_k": top_k([7, 7])}, ["names an entry of the vocabulary twice", "7"]),
        ({"teacher_top_k": top_k([0.0, 1.0])}, ["indices must be integers", "float32"]),
        ({"teacher_top_k": top_k(None, [0.7, 0.4])}, ["sum to more than 1", "1.1", "at the temperature of the call"]),
        ({"teacher_top_k": top_k(None, [0.5, 0.0])}, ["must be finite", "fewer entries"]),
        ({"teacher_top_k": top_k(None, [0.5, float("nan")])}, ["must be finite"]),
        ({"teacher_top_k": top_k(torch.arange(VOCABULARY), FULL)}, ["no entry for its tail", "k=53", "TeacherLogits"]),
        ({"teacher_top_k": top_k(torch.arange(3), FULL[:3]), "vocabulary": 3}, ["no entry for its tail", "1 to 2"]),
        (
            {"teacher_top_k": top_k(torch.empty(0, dtype=torch.long), torch.empty(0))},
            ["names no entry", "k=0"],
        ),
        ({"teacher_top_k": top_k([0, 1, 2])}, ["teacher.log_probabilities", "[3, 7, 2]", "[3, 7, 3]"]),
        (
            {"teacher_top_k": TeacherTopK(indices=torch.zeros(21, 1).long(), log_probabilities=torch.zeros(21, 1))},
            ["teacher.indices", "[21, 1]", "[3, 7, 1]"],
        ),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: list[str]) -> None:
    hidden, weight, _ = make(torch.float32)
    with pytest.raises(UsageError) as caught:
        flat_divergence(hidden, weight, **given)
    for word in words:
        assert word in str(caught.value)


def test_a_mass_rounded_above_1_is_taken_as_1() -> None:
    """Probabilities of bfloat16 log-probabilities sum to 1 to their rounding; float32 ones are held to 1e-4."""
    hidden, weight, _ = make(torch.float32)
    named = torch.tensor([0.9, 0.1008])
    top = TeacherTopK(
        indices=torch.tensor([0, 1]).expand(*TOKENS, 2), log_probabilities=named.log().bfloat16().expand(*TOKENS, 2)
    )
    assert float(top.log_probabilities[0, 0].float().exp().sum()) > 1 + 1e-4
    assert torch.isfinite(flat_divergence(hidden, weight, teacher_top_k=top).total)
    wide = replace(top, log_probabilities=top.log_probabilities.float())
    with pytest.raises(UsageError, match="sum to more than 1"):
        flat_divergence(hidden, weight, teacher_top_k=wide)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(impl: str, value: float) -> None:
    hidden, weight, logits = make(torch.float32)
    logits[1, 1, 1] = value
    with pytest.raises(NonFiniteLoss, match="divergence is not finite"):
        flat_divergence(hidden, weight, teacher_logits=logits, impl=impl)


def test_a_top_k_cannot_run_fused() -> None:
    hidden, weight, logits = make(torch.float32)
    with pytest.raises(
        UsageError, match="cannot run as 'fused': there is no kernel for a teacher given as its likeliest"
    ):
        flat_divergence(hidden, weight, teacher_top_k=TeacherTopK.from_logits(logits, 3), impl="fused")
