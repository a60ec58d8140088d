"""The matrix that a reader makes of a real mixer, times what it mixes, is what the mixer computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from xarch_kd.errors import TapError
from xarch_kd.taps.readers import READERS
from xarch_kd.testing.recurrent import Reading, read_mixer, recurrent_model
from xarch_kd.testing.tiny import VOCABULARY

TIME = 37
Gate = Callable[[Any, Mapping[str, Tensor]], Tensor]


def second_half(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return functional.silu(projected["in_proj"].chunk(2, -1)[1])


def odd_channels(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return functional.silu(projected["in_proj"][..., 1::2])


def first_channels_scaled(mixer: Any, projected: Mapping[str, Tensor]) -> Tensor:
    return functional.silu((projected["in_proj"] * mixer.mup_vector)[..., : mixer.intermediate_size])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family, its mixer, and where the mixer's inner output can be seen: the input of `inner`, or its output `()`.

    `gate` multiplies what is mixed before it can be seen. `error` is the relative error (Frobenius norms over the
    tokens that count) of float32 sums in another order, measured on models of this size; tests allow three times it.
    `depends` are the parameters that M is made of.
    """

    model_type: str
    mixer: str
    inner: str
    error: float
    depends: str
    gate: Gate | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


MAMBA2 = "in_proj.weight in_proj.bias conv1d.weight conv1d.bias dt_bias A_log D"
MAMBA = "in_proj.weight in_proj.bias conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias A_log D"
ZAMBA = "in_proj.weight in_proj.bias conv1d.weight conv1d.bias x_proj_weight dt_proj_weight dt_proj_bias A_log D"
NORMS = " dt_layernorm.weight b_layernorm.weight c_layernorm.weight"
QWEN3_5 = "in_proj_qkv.weight in_proj_a.weight in_proj_b.weight conv1d.weight dt_bias A_log"
OLMO = "q_proj.weight k_proj.weight a_proj.weight b_proj.weight conv1d.weight dt_bias A_log"
KIMI = "q_proj.weight k_proj.weight b_proj.weight conv1d.weight "
KIMI += " ".join(f"forget_gate.{name}" for name in ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log"))
RG_LRU = "linear_x.weight linear_x.bias conv_1d.weight conv_1d.bias rg_lru.recurrent_param "
RG_LRU += " ".join(f"rg_lru.{gate}_gate_{part}" for gate in ("input", "recurrent") for part in ("weight", "bias"))

CASES = {
    "bamba": Case(model_type="bamba", mixer="BambaMixer", inner="norm", error=2e-7, depends=MAMBA2),
    "mamba2": Case(model_type="mamba2", mixer="Mamba2Mixer", inner="norm", error=2e-7, depends=MAMBA2),
    "granitemoehybrid": Case(
        model_type="granitemoehybrid", mixer="GraniteMoeHybridMambaLayer", inner="norm", error=2e-7, depends=MAMBA2
    ),
    "nemotron_h": Case(model_type="nemotron_h", mixer="NemotronHMamba2Mixer", inner="norm", error=2e-7, depends=MAMBA2),
    "zamba2": Case(model_type="zamba2", mixer="Zamba2MambaMixer", inner="norm", error=2e-7, depends=MAMBA2),
    "falcon_h1": Case(model_type="falcon_h1", mixer="FalconH1Mixer", inner="norm", error=2e-7, depends=MAMBA2),
    "falcon_h1 without norm": Case(
        model_type="falcon_h1",
        mixer="FalconH1Mixer",
        inner="out_proj",
        gate=first_channels_scaled,
        error=2e-7,
        depends=MAMBA2,
        overrides={"mamba_rms_norm": False},
    ),
    "mamba": Case(
        model_type="mamba", mixer="MambaMixer", inner="out_proj", gate=second_half, error=2e-7, depends=MAMBA
    ),
    "falcon_mamba": Case(
        model_type="falcon_mamba",
        mixer="FalconMambaMixer",
        inner="out_proj",
        gate=second_half,
        error=2e-7,
        depends=MAMBA,
    ),
    "jamba": Case(
        model_type="jamba",
        mixer="JambaMambaMixer",
        inner="out_proj",
        gate=second_half,
        error=2e-7,
        depends=MAMBA + NORMS,
    ),
    "zamba": Case(
        model_type="zamba", mixer="ZambaMambaMixer", inner="out_proj", gate=odd_channels, error=2e-7, depends=ZAMBA
    ),
    "qwen3_next": Case(
        model_type="qwen3_next",
        mixer="Qwen3NextGatedDeltaNet",
        inner="norm",
        error=3e-7,
        depends="in_proj_qkvz.weight in_proj_ba.weight conv1d.weight dt_bias A_log",
    ),
    "qwen3_5": Case(model_type="qwen3_5_text", mixer="Qwen3_5GatedDeltaNet", inner="norm", error=3e-7, depends=QWEN3_5),
    "qwen3_5_moe": Case(
        model_type="qwen3_5_moe_text", mixer="Qwen3_5MoeGatedDeltaNet", inner="norm", error=3e-7, depends=QWEN3_5
    ),
    "olmo_hybrid": Case(
        model_type="olmo_hybrid", mixer="OlmoHybridGatedDeltaNet", inner="o_norm", error=3e-7, depends=OLMO
    ),
    "olmo_hybrid without negative eigenvalues": Case(
        model_type="olmo_hybrid",
        mixer="OlmoHybridGatedDeltaNet",
        inner="o_norm",
        error=3e-7,
        depends=OLMO,
        overrides={"linear_allow_neg_eigval": False},
    ),
    "kimi_linear": Case(
        model_type="kimi_linear", mixer="KimiLinearDeltaAttention", inner="o_norm", error=3e-7, depends=KIMI
    ),
    "recurrent_gemma": Case(
        model_type="recurrent_gemma",
        mixer="RecurrentGemmaRecurrentBlock",
        inner="rg_lru()",
        error=2e-7,
        depends=RG_LRU,
    ),
    "minimax": Case(
        model_type="minimax", mixer="MiniMaxLightningAttention", inner="norm", error=2e-7, depends="qkv_proj.weight"
    ),
    "lfm2": Case(
        model_type="lfm2",
        mixer="Lfm2ShortConv",
        inner="out_proj",
        error=1e-7,
        depends="in_proj.weight conv.weight",
    ),
    "lfm2_moe": Case(
        model_type="lfm2_moe",
        mixer="Lfm2MoeShortConv",
        inner="out_proj",
        error=1e-7,
        depends="in_proj.weight conv.weight",
    ),
    "lfm3": Case(
        model_type="lfm3",
        mixer="Lfm3ShortConv",
        inner="out_proj",
        error=1e-7,
        depends="in_proj.weight conv.weight",
    ),
}
PADDED_ON_THE_LEFT = [name for name in CASES if name != "recurrent_gemma"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def mixer_of(model: PreTrainedModel, case: Case) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__ == case.mixer)


def mask_of(padding: str) -> Tensor | None:
    """Two sequences, of which the first has nine tokens less."""
    if padding == "none":
        return None
    mask = torch.ones(2, TIME, dtype=torch.int64)
    mask[0, slice(9) if padding == "left" else slice(TIME - 9, None)] = 0
    return mask


def read(case: Case, model: PreTrainedModel, mask: Tensor | None, time: int = TIME) -> Reading:
    ids = torch.randint(1, VOCABULARY, (2, time), generator=torch.Generator().manual_seed(5))
    return read_mixer(model, mixer_of(model, case), READERS[case.mixer].projections, case.inner, ids, mask)


def seen(case: Case, mixer: nn.Module, reading: Reading, mixed: Tensor) -> Tensor:
    """What the mixer makes of M v [batch, time, heads, width] where its inner output is seen, [batch, time, channels]."""
    mixed = rearrange(mixed, "b t h d -> b t (h d)")
    return mixed if case.gate is None else mixed * case.gate(mixer, reading.projected)


def relative_error(value: Tensor, expected: Tensor, mask: Tensor | None) -> float:
    """Norm of the difference over norm of what is expected [batch, time, channels], both over the tokens that count."""
    expected = expected.reshape(value.shape)
    counted = torch.ones(value.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    difference = (value.double() - expected.double())[counted]
    return float(difference.norm() / expected.double()[counted].norm())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_the_matrix_times_the_values_is_the_inner_output(name: str, training: bool, padding: str) -> None:
    if padding == "left" and name not in PADDED_ON_THE_LEFT:
        pytest.skip("refused, see below")
    case, mask = CASES[name], mask_of(padding)
    model = recurrent_model(case.model_type, **case.overrides).train(training)
    mixer, reader = mixer_of(model, case), READERS[case.mixer]
    with torch.no_grad():
        reading = read(case, model, mask)
        mixing = reader.build(mixer, reading.projected, mask)
        values = reader.values(mixer, reading.projected, mask)
        by_entries = torch.einsum("bhij,bjhd->bihd", mixing.dense(), values)
        applied = mixing.apply(values)
    assert mixing.counted().equal(torch.ones(2, TIME, dtype=torch.bool) if mask is None else mask.bool())
    for mixed in (by_entries, applied):
        error = relative_error(seen(case, mixer, reading, mixed), reading.inner, mask)
        print(name, error)
        assert error <= 3 * case.error
