"""`mixing_distance` as 'fused': interpreted kernels against dense formulas reimplemented in float64.

The interpreter cuts maps in tiles of 16 × 16, so 45 tokens are three tiles, the last one not full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.mixing import DeltaMixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops import mixing_distance
from xarch_kd.ops.fused.mixing_distance import rows, unsupported_reason
from xarch_kd.ops.row_distances import FORMULAS

Student = SoftmaxMixing | SSDMixing
EPSILON = 1e-6
DIVERGENCES, SQUARES = ("kl", "cross_entropy"), ("frobenius", "relative_frobenius", "cosine")
# A kernel sums by tiles and takes exp(z - LSE), z and LSE (of up to 6 here) each rounded at their own size, where the
# dense formula takes exp(z - max), small for the entries that matter: up to 6 of its roundings, and 2 for the sums.
# Below the floor, eight roundings at the size of the result, neither is measured.
FACTOR, FLOOR = 8.0, 2.0**-21
# What narrow factors add to their gradients, relative to the norm: three roundings (slopes, what is kept until the
# upstream gradient comes, the result), each of at most half a unit in the last place. (The interpreter truncates to
# bfloat16, which loses as much in the mean.)
ROUNDING = {torch.bfloat16: 3 * 2.0**-8, torch.float16: 3 * 2.0**-11}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def softmax(seed: int, heads: int, key_heads: int, width: int, **settings: Any) -> SoftmaxMixing:
    generator = torch.Generator().manual_seed(seed)
    batch, time = settings.pop("batch", 1), settings.pop("time", 45)
    dtype = settings.pop("dtype", torch.float32)
    return SoftmaxMixing(
        query=normal(generator, batch, time, heads, width).to(dtype),
        key=normal(generator, batch, time, key_heads, width).to(dtype),
        scale=1.3 * width**-0.5,
        **settings,
    )


def ssd(seed: int, heads: int, groups: int, state: int, **settings: Any) -> SSDMixing:
    """Heads that forget slowly, and so fast that exp(-200 dt) is 0."""
    generator = torch.Generator().manual_seed(seed)
    batch, time = settings.pop("batch", 1), settings.pop("time", 45)
    dtype = settings.pop("dtype", torch.float32)
    dt = torch.rand(batch, time, heads, generator=generator, dtype=torch.float64)
    rates = torch.tensor([0.05, 200.0, 1.0, 6.0], dtype=torch.float64)[torch.arange(heads) % 4]
    factors = {
        "C": normal(generator, batch, time, groups, state).to(dtype) * state**-0.5,
        "B": normal(generator, batch, time, groups, state).to(dtype),
        "dt": dt.float(),
        "log_decay": (-dt * rates).float(),
        "D": settings.pop("D", normal(generator, heads).float()),
    }
    return SSDMixing(**factors, **settings)


def bounds(*pairs: tuple[int, int]) -> dict[str, Tensor]:
    return {"valid_range": torch.tensor(pairs)}


def mixture(student_heads: int, teacher_heads: int) -> Tensor:
    """Rows that sum to 1, with one zero each."""
    weights = torch.rand(student_heads, teacher_heads, generator=torch.Generator().manual_seed(5)) + 0.1
    weights[torch.arange(student_heads), torch.arange(student_heads) % teacher_heads] = 0
    return weights / weights.sum(1, keepdim=True)


def inside(mixing: Student) -> Tensor:
    """Mask of the pairs of valid tokens, bool [batch, 1, time, time]."""
    position = torch.arange(mixing.time)
    whole = torch.tensor([[0, mixing.time]] * mixing.batch)
    low, high = (whole if mixing.valid_range is None else mixing.valid_range).unbind(1)
    valid = (position >= low[:, None]) & (position < high[:, None])
    return (valid[:, :, None] & valid[:, None, :])[:, None]


def by_head(tensor: Tensor, heads: int) -> Tensor:
    """[batch, time, groups, ...] -> [batch, heads, time, ...]."""
    index = torch.arange(heads) // (heads // tensor.shape[2])
    return tensor[:, :, index].transpose(1, 2)


def log_softmax_map(mixing: SoftmaxMixing) -> tuple[Tensor, Tensor]:
    """log P [batch, heads, time, time], 0 where nothing is seen, and what is seen."""
    i, j = torch.arange(mixing.time)[:, None], torch.arange(mixing.time)
    seen = inside(mixing) & (i - j < (mixing.window or mixing.time)) & ((j <= i) | (not mixing.causal))
    counted = seen.any(-1)[..., None, None].squeeze(-1)
    query, key = by_head(mixing.query, mixing.heads), by_head(mixing.key, mixing.heads)
    z = torch.where(counted, query, 0) @ torch.where(counted, key, 0).mT * mixing.scale
    if mixing.softcap is not None:
        z = mixing.softcap * (z / mixing.softcap).tanh()
    z = z.masked_fill(~seen, torch.finfo(z.dtype).min)
    return torch.where(seen, z.log_softmax(-1), 0), seen


def ssd_map(mixing: SSDMixing) -> Tensor:
    pairs = inside(mixing).tril()
    live = pairs.any(-1).squeeze(1)[..., None]
    # In float64 always: the dense formula is to lose what its entries' precision loses, not what a long sum does.
    total = torch.where(live, mixing.log_decay, 0).double().cumsum(1).transpose(1, 2)
    exponent = torch.where(pairs, total[..., :, None] - total[..., None, :], float("-inf")).to(mixing.dtype)
    dt = torch.where(live, mixing.dt, 0).transpose(1, 2)
    C = by_head(torch.where(live[..., None], mixing.C, 0), mixing.heads)
    B = by_head(torch.where(live[..., None], mixing.B, 0), mixing.heads)
    entries = (C @ B.mT) * exponent.exp() * dt[..., None, :]
    if mixing.D is not None:
        entries = entries + mixing.D[:, None, None] * torch.eye(mixing.time)
    return torch.where(pairs, entries, 0)


def dense_rows(teacher: SoftmaxMixing, student: Student, distance: Any, head_map: Tensor | None) -> Tensor:
    """The distance of each row [batch, time, heads], in the dtype of the factors."""
    log_p, seen = log_softmax_map(teacher)
    p = torch.where(seen, log_p.exp(), 0)
    p = p if head_map is None else torch.einsum("st,btij->bsij", head_map.to(p.dtype), p)
    if distance in DIVERGENCES:
        assert isinstance(student, SoftmaxMixing)
        values = -(p * log_softmax_map(student)[0]).sum(-1)
        values = values + torch.xlogy(p, p).sum(-1) if distance == "kl" else values
    else:
        log_m, seen = log_softmax_map(student) if isinstance(student, SoftmaxMixing) else (None, None)
        m = ssd_map(student) if isinstance(student, SSDMixing) else torch.where(seen, log_m.exp(), 0)  # type: ignore
        squared, norm = ((p - m) ** 2).sum(-1), (p * p).sum(-1) + EPSILON
        formulas: dict[str, Callable[[], Tensor]] = {
            "frobenius": lambda: squared,
            "relative_frobenius": lambda: squared / norm,
            "cosine": lambda: 1 - (p * m).sum(-1) / (norm * ((m * m).sum(-1) + EPSILON)).sqrt(),
        }
        values = formulas[distance]()
    counted = (inside(teacher) & inside(student)).any(-1)
    return torch.where(counted, values, 0).transpose(1, 2)


def measure(
    function: Callable[..., Tensor], teacher: SoftmaxMixing, student: Student, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Rows and the gradients of every factor, computed in `dtype` (None: as the factors are), as float64."""
    own = student.map_factors(lambda factor: factor.detach().to(dtype or factor.dtype).requires_grad_())
    values = function(teacher.map_factors(lambda factor: factor.to(dtype or factor.dtype)), own)
    upstream = torch.rand(*values.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    values.backward(upstream.to(values.dtype))
    found = {"rows": values.detach().double()}
    for name, factor in own.factors.items():
        assert factor.grad is not None
        found[name] = factor.grad.double()
    return found


def fused(distance: Any, head_map: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda teacher, student: rows(student, teacher, FORMULAS[distance], head_map, EPSILON)


def check(teacher: SoftmaxMixing, student: Student, distance: Any, head_map: Tensor | None = None) -> None:
    assert unsupported_reason(student, teacher, FORMULAS[distance], head_map) is None

    def dense(teacher: SoftmaxMixing, student: Student) -> Tensor:
        return dense_rows(teacher, student, distance, head_map)

    exact = measure(dense, teacher, student, torch.float64)
    plain = measure(dense, teacher, student, torch.float32)
    found = measure(fused(distance, head_map), teacher, student)
    lost = {name: float((plain[name] - true).norm() / true.norm().clamp(min=1e-3)) for name, true in exact.items()}
    # One number per head is too few for an average: D may lose as much as any gradient of the dense formula.
    lost |= {"D": max(lost.values())}
    for name, true in exact.items():
        rounding = ROUNDING.get(student.factors[name].dtype, 0.0) if name in student.factors else 0.0
        size, error = max(float(true.norm()), 1e-3), float((found[name] - true).norm())
        budget = (FACTOR * lost[name] + FLOOR + rounding) * size
        assert error <= budget, f"{name}: {error:.3g} of {size:.3g}, budget {budget:.3g}"


# One of a single token, one with padding on both sides.
RAGGED = bounds((7, 8), (5, 41))


# One distance of each kernel.
@pytest.mark.parametrize("distance", ["kl", "cosine"])
def test_softmax_with_mixtures_windows_caps_and_lengths(distance: Any) -> None:
    teacher = softmax(0, 3, 1, 40, batch=2, window=7, softcap=5.0, **RAGGED)
    student = softmax(1, 1, 1, 24, batch=2, window=11, softcap=2.0, **RAGGED)
    check(teacher, student, distance, mixture(1, 3))


@pytest.mark.parametrize("distance", [*DIVERGENCES, *SQUARES])
def test_every_distance(distance: Any) -> None:
    teacher = softmax(0, 2, 1, 40, time=19)
    check(teacher, softmax(1, 1, 1, 24, time=19), distance, mixture(1, 2))
    if distance in SQUARES:
        check(teacher, ssd(1, 1, 1, 24, time=19), distance, mixture(1, 2))


@pytest.mark.parametrize(("distance", "teacher_keys", "student_keys"), [("kl", 2, 1), ("cosine", 1, 2)])
def test_softmax_with_grouped_heads_on_both_sides(distance: Any, teacher_keys: int, student_keys: int) -> None:
    check(softmax(0, 4, teacher_keys, 16, time=19), softmax(1, 4, student_keys, 20, time=19), distance)


@pytest.mark.parametrize(("distance", "student_causal"), [("kl", False), ("frobenius", True)])
def test_softmax_that_is_not_causal(distance: Any, student_causal: bool) -> None:
    ragged = bounds((0, 20), (3, 17))
    teacher = softmax(0, 1, 1, 16, batch=2, time=20, causal=False, window=9, **ragged)
    check(teacher, softmax(1, 1, 1, 16, batch=2, time=20, causal=student_causal, **ragged), distance)


@pytest.mark.parametrize("distance", ["kl", "cosine"])
def test_each_map_has_its_own_span(distance: Any) -> None:
    teacher = softmax(0, 1, 1, 16, batch=2, time=37, **bounds((18, 37), (2, 30)))
    check(teacher, softmax(1, 1, 1, 16, batch=2, time=37), distance)


def test_ssd_with_mixtures_windows_caps_and_lengths() -> None:
    teacher = softmax(0, 3, 1, 40, batch=2, window=7, softcap=5.0, **RAGGED)
    check(teacher, ssd(1, 2, 1, 24, batch=2, **RAGGED), "cosine", mixture(2, 3))


def test_ssd_groups() -> None:
    check(softmax(0, 4, 2, 16, time=19), ssd(1, 4, 2, 16, time=19), "cosine")


def test_ssd_with_one_state_a_head_for_each_channel_and_no_skip() -> None:
    check(softmax(0, 2, 1, 16, time=19), ssd(1, 2, 1, 1, time=19, D=None), "frobenius", mixture(2, 2))


def test_small_decays_after_large_ones_keep_their_size() -> None:
    """The sum of logarithms passes 15 000, where float32 has steps of 0.001, ten times the later decays."""
    student = ssd(1, 1, 1, 16, D=None)
    student.log_decay[:, :16], student.log_decay[:, 16:] = -999.0, -1e-4
    check(softmax(0, 1, 1, 16), student, "cosine")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["softmax kl", "softmax cosine", "ssd cosine"])
def test_narrow_dtypes(kind: str, dtype: torch.dtype) -> None:
    teacher = softmax(0, 2, 1, 16, time=19, dtype=dtype)
    make = softmax if kind.startswith("softmax") else ssd
    check(teacher, make(1, 2, 1, 24, time=19, dtype=dtype), kind.split()[1])


def test_gradients_between_maps_that_are_almost_one_survive_bfloat16() -> None:
    """At a KL of 4e-5 the difference of two rounded products would be wrong by a sixth."""
    teacher = softmax(0, 2, 1, 32, dtype=torch.bfloat16)
    shift = normal(torch.Generator().manual_seed(3), *teacher.query.shape) * 0.01
    student = softmax(0, 2, 1, 32)
    student = SoftmaxMixing(
        query=student.query + shift.float(), key=teacher.key.float(), scale=teacher.scale
    ).map_factors(torch.Tensor.bfloat16)
    check(teacher, student, "kl")


def test_small_upstream_gradients_survive_float16() -> None:
    """Slopes of 1e-7, below float16's smallest number, against queries of 500: the key's gradient is representable."""
    teacher = softmax(0, 1, 1, 16, time=33, dtype=torch.float16)
    student = softmax(1, 1, 1, 16, time=33, dtype=torch.float16)
    query, key = (student.query * 500).requires_grad_(), (student.key / 500).requires_grad_()
    student = SoftmaxMixing(query=query, key=key, scale=student.scale)
    true = measure(lambda t, s: dense_rows(t, s, "kl", None) * 1e-6, teacher, student, torch.float64)["key"]
    found = measure(lambda t, s: rows(s, t, FORMULAS["kl"], None, EPSILON) * 1e-6, teacher, student)["key"]
    # The gradient itself is written in float16: half of its smallest step, on top of its rounding.
    assert bool(((found - true).abs() <= 2.0**-10 * true.abs() + 2.0**-24).all())


@pytest.mark.parametrize("student", [softmax(1, 2, 1, 16, time=1), ssd(1, 2, 1, 16, time=1)], ids=["softmax", "ssd"])
def test_single_tokens(student: Student) -> None:
    check(softmax(0, 2, 2, 16, time=1), student, "cosine")


@pytest.mark.parametrize(
    "student", [softmax(1, 1, 1, 16, batch=2, time=19), ssd(1, 1, 1, 16, batch=2, time=19)], ids=["softmax", "ssd"]
)
def test_what_stands_in_padding_changes_nothing(student: Student) -> None:
    """The second sequence is padding alone: zeros everywhere, whatever the factors hold."""
    ranges = bounds((3, 17), (5, 5))
    teacher, student = softmax(0, 1, 1, 16, batch=2, time=19, **ranges), dataclasses.replace(student, **ranges)
    distance = "kl" if isinstance(student, SoftmaxMixing) else "cosine"
    padding = ~inside(student).any(-1).squeeze(1)

    def poison(factor: Tensor) -> Tensor:
        return factor if factor.dim() == 1 else torch.where(padding.view(2, 19, *[1] * (factor.dim() - 2)), nan, factor)

    nan = torch.tensor(float("nan"))
    clean = measure(fused(distance), teacher, student)
    poisoned = measure(fused(distance), teacher.map_factors(poison), student.map_factors(poison))
    for name, found in clean.items():
        assert torch.equal(poisoned[name], found), name
        assert found.dim() == 1 or bool((found[padding] == 0).all())
    assert bool((clean["rows"][0, 4:17] != 0).all())


def test_factors_need_not_be_contiguous() -> None:
    teacher, student = softmax(0, 2, 2, 16, time=9), softmax(1, 2, 2, 16, time=9)
    joined = torch.cat([student.query, student.key], -1)
    apart = SoftmaxMixing(query=joined[..., :16], key=joined[..., 16:], scale=student.scale)
    across = teacher.map_factors(lambda factor: factor.transpose(1, 3).contiguous().transpose(1, 3))
    expected, found = measure(fused("kl"), teacher, student), measure(fused("kl"), across, apart)
    assert not apart.query.is_contiguous() and across.query.stride(-1) != 1
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("student", [softmax(1, 2, 1, 16, time=19), ssd(1, 2, 1, 16, time=19)], ids=["softmax", "ssd"])
def test_heads_of_a_group_are_shared_out_or_not(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small grids split a group's heads over programs, as in every other test here; large ones do not."""
    teacher = softmax(0, 2, 1, 16, time=19)
    shared = measure(fused("cosine"), teacher, student)
    monkeypatch.setattr("xarch_kd.kernels.mixing_blocks.PROGRAMS", 1)
    alone = measure(fused("cosine"), teacher, student)
    for name in shared:
        # Two float32 numbers, added by another program.
        torch.testing.assert_close(alone[name], shared[name], rtol=0, atol=2.0**-20 * float(shared[name].abs().max()))


def test_the_teacher_gets_no_gradient() -> None:
    teacher = softmax(0, 1, 1, 16, time=5).map_factors(lambda factor: factor.requires_grad_())
    for distance in ("kl", "cosine"):
        assert not fused(distance)(teacher, softmax(1, 1, 1, 16, time=5)).requires_grad


def test_one_factor_alone_is_trained() -> None:
    teacher, student = softmax(0, 1, 1, 16, time=19), softmax(1, 1, 1, 16, time=19)
    for distance in ("kl", "cosine"):
        both = measure(fused(distance), teacher, student)
        for name in ("query", "key"):
            own = student.map_factors(torch.Tensor.detach)
            factor = own.factors[name].requires_grad_()
            upstream = torch.rand(1, 19, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
            fused(distance)(teacher, own).backward(upstream.float())
            assert factor.grad is not None and torch.equal(factor.grad.double(), both[name])
            factor.requires_grad_(False)


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each custom operator with arguments for it."""
    from xarch_kd.kernels import mixing_distance as kernels

    teacher, student, other = softmax(0, 2, 1, 16, time=5), softmax(1, 1, 1, 16, time=5), ssd(1, 2, 1, 16, time=5)
    ranges, settings = torch.tensor([[0, 5, 1, 4]], dtype=torch.int32), ([0.2, 0.3], [0.0, 3.0])
    own = [factor.requires_grad_() for factor in student.factors.values()]
    pair = (*own, *teacher.factors.values(), ranges, mixture(1, 2), *settings, [True, True], [0, 3])
    factors = [factor.requires_grad_() for factor in other.factors.values()]
    of_ssd = (*factors, *teacher.factors.values(), ranges, None, 0.3, 3.0, 0)
    return {
        "softmax_divergence": (kernels.softmax_divergence, (*pair, "kl", True)),
        "softmax_statistics": (kernels.softmax_statistics, pair),
        "ssd_statistics": (kernels.ssd_statistics, of_ssd),
    }


@pytest.mark.parametrize("name", ["softmax_divergence", "softmax_statistics", "ssd_statistics"])
def test_torch_accepts_the_operators(name: str) -> None:
    operator, arguments = operators()[name]
    done = torch.library.opcheck(operator, arguments)
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4


def test_compiled_graphs_hold_the_operators_whole() -> None:
    for operator, arguments in operators().values():
        torch.compiler.reset()
        compiled = torch.compile(lambda *given, operator=operator: operator(*given)[0], fullgraph=True, backend="eager")
        assert torch.equal(compiled(*arguments), operator(*arguments)[0])


@pytest.mark.parametrize(
    "student", [softmax(1, 1, 1, 16, batch=2, time=19), ssd(1, 1, 1, 16, batch=2, time=19)], ids=["softmax", "ssd"]
)
def test_the_operation_runs_it_when_asked(student: Student) -> None:
    teacher, mask = softmax(0, 2, 1, 16, batch=2, time=19), torch.ones(2, 19, dtype=torch.bool)
    mask[0, 4:9] = False

    def run(impl: str) -> Callable[..., Tensor]:
        return lambda teacher, student: mixing_distance(
            student, teacher, head_map=mixture(1, 2), mask=mask, impl=impl
        ).total[None, None]

    expected, found = measure(run("reference"), teacher, student), measure(run("fused"), teacher, student)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2.0**-16 * float(value.abs().max()))


PLAIN, SMALL_SSD = softmax(0, 1, 1, 8, time=4), ssd(0, 1, 1, 8, time=4)
DELTA = DeltaMixing(query=PLAIN.query, key=PLAIN.key, beta=torch.ones(1, 4, 1))
UNSUPPORTED: dict[str, tuple[Any, Any, str, str]] = {
    "student": (PLAIN, DELTA, "cosine", "not for softmax with delta"),
    "teacher": (SMALL_SSD, PLAIN, "cosine", "not for ssd with softmax"),
    "divergence": (PLAIN, SMALL_SSD, "kl", "kl compares probabilities"),
    "acausal": (dataclasses.replace(PLAIN, causal=False), SMALL_SSD, "cosine", "not causal"),
    "sinks": (dataclasses.replace(PLAIN, sinks=torch.zeros(1)), PLAIN, "cosine", "sinks"),
    "student sinks": (PLAIN, dataclasses.replace(PLAIN, sinks=torch.zeros(1)), "cosine", "sinks"),
    "width": (PLAIN, softmax(0, 1, 1, 257, time=4), "cosine", "at most 256 numbers, and these have 257"),
    "dtype": (PLAIN, PLAIN.map_factors(torch.Tensor.double), "cosine", "not float64"),
}


@pytest.mark.parametrize(("teacher", "student", "distance", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_reason_for_what_is_unsupported(teacher: Any, student: Any, distance: Any, reason: str) -> None:
    found = unsupported_reason(student, teacher, FORMULAS[distance], None)
    assert found is not None and reason in found


def test_tensors_of_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = unsupported_reason(PLAIN, PLAIN, FORMULAS["kl"], None)
    assert found is not None and "need a GPU" in found
