"""Sizes of converted mixers that llama.cpp and mlx-lm require: what the student starts with, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import ConversionError
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.convert import convert, plan_conversion
from xarch_kd.models.conversion.mixers import mixer_from_attention
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.conversion.teacher_spec import teacher_spec
from xarch_kd.models.conversion.weights import TeacherWeights
from xarch_kd.testing.tiny import tiny_config, tiny_model

IDS = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(0))
FOR_LLAMA_CPP = {"expand": 2, "proj_bias": False}


def converted(teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return convert(teacher, keep_attention=[1], target="granitemoehybrid", mamba2=options or None)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_twice_the_channels_start_with_the_same_output() -> None:
    teacher = tiny_model("llama")
    narrow, wide = converted(teacher), converted(teacher, expand=2)
    assert (wide.config.mamba_expand, wide.config.mamba_d_head) == (2, 2 * narrow.config.mamba_d_head)
    largest = float(logits(narrow).abs().max())
    assert (logits(wide) - logits(narrow)).abs().max() <= logits_tolerance(largest, 3, torch.float32)
    own, other = narrow.state_dict(), wide.state_dict()
    assert [name for name in own if ".mamba." not in name and not own[name].equal(other[name])] == []
    # The second half is not read, and a step of training can change that.
    wide(IDS, labels=IDS).loss.backward()
    weight = wide.model.layers[0].mamba.out_proj.weight
    assert weight.grad is not None and not weight.view(64, 4, 2, 16)[:, :, 1].any()
    assert bool((weight.grad.view(64, 4, 2, 16)[:, :, 1] != 0).all())


def test_without_biases_a_mixer_is_the_same_where_the_row_along_the_mean_gives_one() -> None:
    """The teacher's biases move into the convolution, and the gate opens alike for all channels of a token."""
    teacher = tiny_model("qwen2")
    with_bias, without = converted(teacher), converted(teacher, proj_bias=False)
    assert without.model.layers[0].mamba.in_proj.bias is None and without.model.layers[0].mamba.out_proj.bias is None
    spec = teacher_spec(teacher.config)
    block = TeacherWeights(teacher, spec).block(0)
    inputs = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1))
    inputs[..., 0] = 1.0
    constant = torch.zeros(64)
    constant[0] = 1.0
    outputs = []
    for student in (with_bias, without):
        shape = RECIPES["mamba2"].shape(student.config.to_dict())
        mixer = student.model.layers[0].mamba
        mixer.load_state_dict(mixer_from_attention(block, spec, shape, constant))
        with torch.no_grad():
            outputs.append(mixer(inputs))
    assert float(outputs[0].abs().max()) > 0.01
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()


def test_heads_of_a_group_share_the_mean_of_their_queries_and_keys() -> None:
    teacher = tiny_model("llama")
    assert logits(converted(teacher, n_groups=4)).equal(logits(converted(teacher)))
    apart, shared = (converted(teacher, n_groups=count).model.layers[0].mamba for count in (4, 1))
    assert shared.in_proj.weight.shape == (64 + 64 + 2 * 16 + 4, 64)
    keys = apart.in_proj.weight[128 : 128 + 64].view(4, 16, 64).mean(dim=0)
    torch.testing.assert_close(shared.in_proj.weight[128:144], keys)


@pytest.mark.parametrize("groups", [4, 1])
def test_such_a_student_fits_llama_cpp(tmp_path: Path, groups: int) -> None:
    pytest.importorskip("gguf", reason="files are written with the gguf package")
    from tests.models.llama_cpp_graphs import Graph
    from xarch_kd.models.gguf.write import export_gguf

    student = converted(tiny_model("qwen2"), **FOR_LLAMA_CPP, n_groups=groups)
    file = export_gguf(student, tmp_path / "student.gguf")
    assert file.architecture == "granitehybrid"
    expected, found = logits(student)[0].double().numpy(), Graph(file.path).logits(IDS[0].tolist())
    assert np.abs(found - expected).max() <= logits_tolerance(float(np.abs(expected).max()), 3, torch.float32)


def test_random_mixers_have_these_sizes() -> None:
    student = convert(
        tiny_model("llama"), keep_attention=[1], init="random", mamba2={**FOR_LLAMA_CPP, "n_groups": 2}, check=False
    )
    assert student.model.layers[0].mamba.in_proj.weight.shape == (128 + 128 + 2 * 2 * 16 + 4, 64)


def test_what_they_cost_is_reported() -> None:
    def notices(family: str, **options: Any) -> str:
        return " ".join(plan_conversion(tiny_config(family), keep_attention=[1], mamba2=options).warnings)

    assert notices("llama", expand=2) == notices("llama", n_groups=4) == ""
    assert "a row along the mean input" in notices("llama", proj_bias=False)
    assert "4 heads share the mean" in notices("llama", n_groups=1)
    config = tiny_config("llama", attention_bias=True)
    planned = plan_conversion(config, keep_attention=[1], mamba2={"proj_bias": False})
    assert "output projection is dropped" in " ".join(planned.warnings)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown option": ({"mamba2": {"width": 2}}, r"Unknown options(.|\n)*expand, proj_bias, n_groups"),
    "a width that does not divide": (
        {"mamba2": {"n_groups": 3}},
        r"do not divide evenly over the groups(.|\n)*a divisor of 4",
    ),
    "the teacher's own class": ({"mamba2": {"expand": 2}, "target": "in_place"}, "Mamba-2 mixers in a stock class"),
    "another mixer": ({"mamba2": {"expand": 2}, "mixer": "gated_delta"}, "Mamba-2 mixers in a stock class"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        plan_conversion(tiny_config("llama"), keep_attention=[1], **options)


def test_too_narrow_a_mixer_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"do not hold the teacher's heads(.|\n)*at least 128"):
        plan_conversion(tiny_config("llama", head_dim=32), keep_attention=[1], mamba2={"expand": 1})
