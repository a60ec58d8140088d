from __future__ import annotations

from typing import Any

import pytest
import torch

from xarch_kd.errors import TapError, UsageError
from xarch_kd.taps.layout import Layout, layout_of, trainable_names


def names_under(model, *prefixes):
    return tuple(name for name, _ in model.named_parameters() if name.startswith(prefixes))


def test_the_parts_of_a_bamba(build):
    model = build("bamba")
    layout = layout_of(model)
    assert layout.base is model.model
    assert layout.blocks == tuple(model.model.layers)
    assert layout.mixer_kinds == ("mamba2", "attention", "mamba2")
    assert layout.mixers[0] is model.model.layers[0].mamba and layout.mixers[1] is model.model.layers[1].self_attn
    assert layout.mlps is not None and layout.mlps[2] is model.model.layers[2].feed_forward
    assert layout.embedding is model.model.embed_tokens and layout.final_norm is model.model.final_layernorm
    assert layout.head is model.lm_head and layout.head_weight is model.lm_head.weight and layout.head_bias is None
    assert (layout.dim, layout.mixer_scales, layout.mlp_scale) == (64, (1.0, 1.0, 1.0), 1.0)
    assert (layout.logit_scale, layout.logit_softcap) == (1.0, None)
    assert layout.path_of(layout.mixers[1]) == "model.layers.1.self_attn"


def test_a_layout_is_returned_as_it_is(build):
    layout = layout_of(build("llama"))
    assert isinstance(layout, Layout) and layout_of(layout) is layout


def test_multipliers_and_softcap_come_from_the_config(build):
    granite, gemma = layout_of(build("granite")), layout_of(build("gemma2"))
    assert (granite.mixer_scales, granite.mlp_scale, granite.logit_scale) == ((0.6, 0.6, 0.6), 0.6, 0.5)
    assert gemma.logit_softcap == 30.0
    assert layout_of(build("falcon_h1", lm_head_multiplier=0.5)).logit_scale == 0.5


def test_a_mamba_has_no_mlps(build):
    layout = layout_of(build("mamba"))
    assert layout.mlps is None and layout.mlp_outputs is None and layout.mixer_kinds == ("mamba",) * 3


def test_a_base_model_has_no_head_and_says_so(build):
    layout = layout_of(build("llama").model)
    assert layout.head is None
    with pytest.raises(TapError, match="LlamaModel has no output head"):
        _ = layout.head_weight


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("selection", "prefixes"),
    [
        (["mixers"], ("model.layers.0.mamba.", "model.layers.1.self_attn.", "model.layers.2.mamba.")),
        (["blocks"], ("model.layers.",)),
        (["embeddings"], ("model.embed_tokens.",)),
        (["head"], ("lm_head.",)),
        (["embeddings", "head"], ("model.embed_tokens.", "lm_head.")),
        (["all"], ("",)),
        (["all", "mixers"], ("",)),
    ],
)
def test_selections_of_a_bamba(selection, prefixes, place, build, build_meta):
    model = (build if place == "cpu" else build_meta)("bamba")
    assert trainable_names(model, layout_of(model), selection) == names_under(model, *prefixes)


def test_mixers_are_those_of_the_layers_that_were_replaced(build):
    model = build("bamba")
    layout = layout_of(model)
    expected = names_under(model, "model.layers.2.mamba.")
    assert trainable_names(model, layout, ["mixers"], [2]) == expected == layout.mixer_parameter_names(2)
    assert "model.layers.2.mamba.A_log" in expected


def test_norms_are_all_norms_those_inside_mixers_included(build):
    model = build("bamba")
    assert trainable_names(model, layout_of(model), ["norms"]) == tuple(
        name for name, _ in model.named_parameters() if "norm" in name
    )


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_tied_head_and_embedding_are_one_parameter(place, build, build_meta):
    model = (build if place == "cpu" else build_meta)("llama", tie_word_embeddings=True)
    layout = layout_of(model)
    for word in ("head", "embeddings"):
        assert trainable_names(model, layout, [word]) == ("model.embed_tokens.weight",)


def test_an_unknown_part_suggests_the_right_one(build):
    model = build("llama")
    with pytest.raises(UsageError, match=r"train: unknown part. Did you mean 'mixers'\?"):
        trainable_names(model, layout_of(model), ["mixer"])


def test_a_part_that_the_model_lacks_is_refused(build):
    model = build("llama").model
    with pytest.raises(TapError, match="LlamaModel has no parameters of the part"):
        trainable_names(model, layout_of(model), ["blocks", "head"])


def test_mixers_of_no_layer_are_refused(build):
    model = build("bamba")
    with pytest.raises(TapError, match="asked:   mixers"):
        trainable_names(model, layout_of(model), ["mixers"], [])


def test_mixers_of_a_layer_out_of_range_are_refused(build):
    model = build("bamba")
    with pytest.raises(UsageError, match="allowed: 0 to 2"):
        trainable_names(model, layout_of(model), ["mixers"], [3])


def test_names_are_those_of_the_model_inside_torch_compile(build):
    model = build("llama")
    compiled: Any = torch.compile(model, backend="eager")
    assert trainable_names(compiled, layout_of(compiled), ["head"]) == ("lm_head.weight",)
