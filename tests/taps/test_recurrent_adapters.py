"""The matrix that an adapter builds, times its values, is what the real mixer computed; gradients too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from xarch_kd.errors import TapError
from xarch_kd.mixing.base import Mixing
from xarch_kd.taps.adapters import ADAPTERS
from xarch_kd.testing.recurrent import Recorded, read_mixer, recurrent_model
from xarch_kd.testing.tiny import VOCABULARY

TIME = 37
Gate = Callable[[Any, Mapping[str, Tensor]], Tensor]

# Relative errors (Frobenius norms over the tokens that count) between float32 sums in the order of the mixer and of the
# matrix, by the kind of mixing: the largest seen on models of this size. Tests allow three times it, for other orders.
ERRORS = {"ssd": 1.1e-7, "selective": 2.2e-7, "delta": 2.8e-7, "linear": 1.4e-7, "banded": 9e-8}


def second_half(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return functional.silu(projected["in_proj"].chunk(2, -1)[1])


def odd_channels(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return functional.silu(projected["in_proj"][..., 1::2])


def first_channels_scaled(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return functional.silu((projected["in_proj"] * mixer.mup_vector)[..., : mixer.intermediate_size])


class Case(NamedTuple):
    """A family, its mixer, and where the mixer's inner output can be seen: the input of `inner`, or its output `()`.

    `depends` are the parameters that M is made of; `gate` multiplies what is mixed before it can be seen.
    """

    model_type: str
    mixer: str
    inner: str
    depends: str
    gate: Gate | None = None
    overrides: Mapping[str, Any] = {}


MAMBA2 = "in_proj.weight in_proj.bias conv1d.weight conv1d.bias dt_bias A_log D"
MAMBA = "in_proj.weight in_proj.bias conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias A_log D"
ZAMBA = "in_proj.weight in_proj.bias conv1d.weight conv1d.bias x_proj_weight dt_proj_weight dt_proj_bias A_log D"
JAMBA = f"{MAMBA} dt_layernorm.weight b_layernorm.weight c_layernorm.weight"
QWEN3_NEXT = "in_proj_qkvz.weight in_proj_ba.weight conv1d.weight dt_bias A_log"
QWEN3_5 = "in_proj_qkv.weight in_proj_a.weight in_proj_b.weight conv1d.weight dt_bias A_log"
OLMO = "q_proj.weight k_proj.weight a_proj.weight b_proj.weight conv1d.weight dt_bias A_log"
FORGET = "forget_gate.f_a_proj.weight forget_gate.f_b_proj.weight forget_gate.dt_bias forget_gate.A_log"
KIMI = f"q_proj.weight k_proj.weight b_proj.weight conv1d.weight {FORGET}"
GATES = " ".join(f"rg_lru.{gate}_gate_{part}" for gate in ("input", "recurrent") for part in ("weight", "bias"))
RG_LRU = f"linear_x.weight linear_x.bias conv_1d.weight conv_1d.bias rg_lru.recurrent_param {GATES}"
CONVOLUTION = "in_proj.weight conv.weight"

CASES = {
    "bamba": Case("bamba", "BambaMixer", "norm", MAMBA2),
    "mamba2": Case("mamba2", "Mamba2Mixer", "norm", MAMBA2),
    "granitemoehybrid": Case("granitemoehybrid", "GraniteMoeHybridMambaLayer", "norm", MAMBA2),
    "nemotron_h": Case("nemotron_h", "NemotronHMamba2Mixer", "norm", MAMBA2),
    "zamba2": Case("zamba2", "Zamba2MambaMixer", "norm", MAMBA2),
    "falcon_h1": Case("falcon_h1", "FalconH1Mixer", "norm", MAMBA2),
    "falcon_h1 without norm": Case(
        "falcon_h1", "FalconH1Mixer", "out_proj", MAMBA2, first_channels_scaled, {"mamba_rms_norm": False}
    ),
    "mamba": Case("mamba", "MambaMixer", "out_proj", MAMBA, second_half),
    "falcon_mamba": Case("falcon_mamba", "FalconMambaMixer", "out_proj", MAMBA, second_half),
    "jamba": Case("jamba", "JambaMambaMixer", "out_proj", JAMBA, second_half),
    "zamba": Case("zamba", "ZambaMambaMixer", "out_proj", ZAMBA, odd_channels),
    "qwen3_next": Case("qwen3_next", "Qwen3NextGatedDeltaNet", "norm", QWEN3_NEXT),
    "qwen3_5": Case("qwen3_5_text", "Qwen3_5GatedDeltaNet", "norm", QWEN3_5),
    "qwen3_5_moe": Case("qwen3_5_moe_text", "Qwen3_5MoeGatedDeltaNet", "norm", QWEN3_5),
    "olmo_hybrid": Case("olmo_hybrid", "OlmoHybridGatedDeltaNet", "o_norm", OLMO),
    "olmo_hybrid, beta below 1": Case(
        "olmo_hybrid", "OlmoHybridGatedDeltaNet", "o_norm", OLMO, None, {"linear_allow_neg_eigval": False}
    ),
    "kimi_linear": Case("kimi_linear", "KimiLinearDeltaAttention", "o_norm", KIMI),
    "recurrent_gemma": Case("recurrent_gemma", "RecurrentGemmaRecurrentBlock", "rg_lru()", RG_LRU),
    "minimax": Case("minimax", "MiniMaxLightningAttention", "norm", "qkv_proj.weight"),
    "lfm2": Case("lfm2", "Lfm2ShortConv", "out_proj", CONVOLUTION),
    "lfm2_moe": Case("lfm2_moe", "Lfm2MoeShortConv", "out_proj", CONVOLUTION),
    "lfm3": Case("lfm3", "Lfm3ShortConv", "out_proj", CONVOLUTION),
}
READS_PADDING = ("recurrent_gemma",)


class Built(NamedTuple):
    """A mixer of a model, what was read of it in one pass, and what it makes of M v where its inner output is seen."""

    mixer: nn.Module
    recorded: Recorded
    mixing: Mixing
    values: Tensor
    gate: Tensor | None

    def seen(self, mixed: Tensor) -> Tensor:
        mixed = rearrange(mixed, "b t h d -> b t (h d)")
        return mixed if self.gate is None else mixed * self.gate

    @property
    def by_entries(self) -> Tensor:
        return torch.einsum("bhij,bjhd->bihd", self.mixing.dense(), self.values.to(self.mixing.dtype))

    @property
    def inner(self) -> Tensor:
        return self.recorded.inner.reshape(self.seen(self.values).shape)


def model_of(case: Case, **overrides: Any) -> PreTrainedModel:
    return recurrent_model(case.model_type, **{**case.overrides, **overrides})


def read(case: Case, model: PreTrainedModel, mask: Tensor | None, time: int = TIME) -> Built:
    adapter = ADAPTERS[case.mixer]
    mixer = next(module for module in model.modules() if type(module).__name__ == case.mixer)
    ids = torch.randint(1, VOCABULARY, (2, time), generator=torch.Generator().manual_seed(5))
    recorded = read_mixer(model, mixer, adapter.projections, case.inner, ids, mask)
    mixing = adapter.build(mixer, recorded.projected, mask)
    values = adapter.values(mixer, recorded.projected, mask)
    return Built(mixer, recorded, mixing, values, case.gate and case.gate(mixer, recorded.projected))


def mask_of(padding: str) -> Tensor | None:
    """Two sequences, of which the first has nine tokens less."""
    if padding == "none":
        return None
    mask = torch.ones(2, TIME, dtype=torch.int64)
    mask[0, slice(9) if padding == "left" else slice(TIME - 9, None)] = 0
    return mask


def paddings(name: str) -> list[str]:
    return ["none", "right"] if name in READS_PADDING else ["none", "left", "right"]


def relative_error(value: Tensor, expected: Tensor, counted: Tensor) -> float:
    difference = (value.double() - expected.double())[counted]
    return float(difference.norm() / expected.double()[counted].norm())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "padding"), [(name, padding) for name in CASES for padding in paddings(name)])
@torch.no_grad()
def test_the_matrix_times_the_values_is_the_inner_output(name: str, padding: str, training: bool) -> None:
    mask = mask_of(padding)
    found = read(CASES[name], model_of(CASES[name]).train(training), mask)
    counted = found.mixing.valid_mask()
    assert counted.equal(torch.ones(2, TIME, dtype=torch.bool) if mask is None else mask.bool())
    for mixed in (found.by_entries, found.mixing.apply(found.values)):
        assert relative_error(found.seen(mixed), found.inner, counted) <= 3 * ERRORS[found.mixing.kind]


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_what_the_matrix_depends_on_and_nothing_else(name: str) -> None:
    found = read(CASES[name], model_of(CASES[name]), mask_of(paddings(name)[1]))
    found.mixing.dense().square().sum().backward()
    gradients = {key: value.grad for key, value in found.mixer.named_parameters() if value.grad is not None}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert {key for key, gradient in gradients.items() if bool(gradient.any())} == set(CASES[name].depends.split())


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_mixer(name: str) -> None:
    found = read(CASES[name], model_of(CASES[name]), mask_of(paddings(name)[1]))
    probe = torch.randn(found.inner.shape, generator=torch.Generator().manual_seed(7))
    probe = probe * found.mixing.valid_mask()[..., None]
    names, parameters = zip(*found.mixer.named_parameters(), strict=True)
    through_mixer, through_matrix = (
        torch.autograd.grad((output * probe).sum(), parameters, retain_graph=True, materialize_grads=True)
        for output in (found.inner, found.seen(found.by_entries))
    )
    for key, expected, gradient in zip(names, through_mixer, through_matrix, strict=True):
        # A gradient sums terms of either sign over all tokens, which leaves more rounding than the output has.
        scale = float(expected.norm())
        assert float((gradient - expected).norm()) <= 30 * ERRORS[found.mixing.kind] * scale, key
        assert scale > 0 or key not in CASES[name].depends.split(), key


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_sequence_of_one_token(name: str) -> None:
    found = read(CASES[name], model_of(CASES[name]), None, time=1)
    counted = found.mixing.valid_mask()
    assert relative_error(found.seen(found.by_entries), found.inner, counted) <= 3 * ERRORS[found.mixing.kind]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_model_in_bfloat16(name: str) -> None:
    found = read(CASES[name], model_of(CASES[name]).bfloat16(), None)
    assert found.mixing.dtype == torch.float32
    for factor in ("log_decay", "dt", "beta"):
        assert getattr(found.mixing, factor, torch.zeros(())).dtype == torch.float32
    # A rounding to 8 bits errs by 2^-9 at most; the mixers round a few times where the factors are kept in float32.
    assert relative_error(found.seen(found.by_entries), found.inner, found.mixing.valid_mask()) <= 4 * 2**-9


def test_every_reader_is_tested() -> None:
    assert set(ADAPTERS) == {case.mixer for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_padding_holds_is_no_part_of_the_matrix(name: str) -> None:
    case, mask = CASES[name], mask_of("right")
    assert mask is not None
    found = read(case, model_of(case), mask)
    changed = {
        path: torch.where(mask[..., None] == 1, projected, 7.0) for path, projected in found.recorded.projected.items()
    }
    assert ADAPTERS[case.mixer].build(found.mixer, changed, mask).dense().equal(found.mixing.dense())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_sequence_of_padding_alone_mixes_nothing(name: str) -> None:
    mask = torch.ones(2, TIME, dtype=torch.int64)
    mask[1] = 0
    dense = read(CASES[name], model_of(CASES[name]), mask).mixing.dense()
    assert dense[1].count_nonzero() == 0
    assert dense[0].count_nonzero() > 0


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_padding_between_tokens_is_refused(name: str) -> None:
    mask = torch.ones(2, TIME, dtype=torch.int64)
    mask[1, 5] = 0
    with pytest.raises(TapError, match="sequence 1 has 36 valid tokens"):
        read(CASES[name], model_of(CASES[name]), mask)


@torch.no_grad()
def test_a_mixer_that_reads_padding_as_tokens_takes_none_on_the_left() -> None:
    with pytest.raises(TapError, match=r"RecurrentGemmaRecurrentBlock\n.*9 padding tokens"):
        read(CASES["recurrent_gemma"], model_of(CASES["recurrent_gemma"]), mask_of("left"))


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "lfm3"])
@torch.no_grad()
def test_the_bias_of_a_short_convolution_is_no_part_of_the_matrix(name: str) -> None:
    found = read(CASES[name], model_of(CASES[name], conv_bias=True), mask_of("right"))
    row_scale = found.recorded.projected["in_proj"].chunk(3, dim=-1)[1]
    mixed = found.seen(found.by_entries) + row_scale * found.mixer.get_parameter("conv.bias")
    assert relative_error(mixed, found.inner, found.mixing.valid_mask()) <= 3 * ERRORS["banded"]


@torch.no_grad()
def test_a_gate_that_forgets_nothing_has_finite_gradients() -> None:
    case = CASES["recurrent_gemma"]
    model = model_of(case)
    for name, parameter in model.named_parameters():
        if name.endswith("recurrent_gate_bias"):
            parameter.fill_(-80.0)
    with torch.enable_grad():
        found = read(case, model, None)
        found.mixing.dense().square().sum().backward()
    assert bool((found.mixing.factors["log_decay"] > -1e-8).all())
    gradients = [parameter.grad for parameter in found.mixer.parameters() if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
