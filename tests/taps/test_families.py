from __future__ import annotations

from types import SimpleNamespace

import pytest

from xarch_kd.errors import TapError, UsageError
from xarch_kd.taps.families import FAMILIES, family_of


def test_the_types_that_were_promised_are_in_the_table():
    promised = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "gemma", "bamba", "mamba", "mamba2"}
    assert promised <= FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_resolves_in_a_real_model_of_its_type(model_type, build_meta):
    from xarch_kd.taps.layout import layout_of

    model = build_meta(model_type)
    layout = layout_of(model)
    assert len(layout.blocks) == model.config.num_hidden_layers
    assert layout.embedding is model.get_input_embeddings()
    assert layout.head is model.get_output_embeddings()
    assert layout.final_norm is not None
    assert layout.base is model.base_model and layout.base is not model


def test_an_unknown_type_names_the_nearest_and_shows_the_syntax_of_paths():
    with pytest.raises(TapError) as caught:
        family_of("gwen2")
    message = str(caught.value)
    assert "type 'gwen2' are not known" in message
    assert "nearest known types: qwen2, qwen3" in message
    assert "paths: {blocks: model.layers, mixer: self_attn," in message
    assert caught.value.exit_code == 3


def test_an_unknown_type_with_no_near_name_lists_the_known_ones():
    with pytest.raises(TapError, match="no known type with a similar name") as caught:
        family_of("zzzzzzzz")
    assert caught.value.allowed == ", ".join(sorted(FAMILIES))


@pytest.mark.parametrize("form", [dict, lambda **fields: SimpleNamespace(**fields)])
def test_paths_win_over_the_table_as_a_mapping_or_an_object(form):
    family = family_of("llama", form(blocks="decoder.layers", mixer="attn | ssm", mlp="ffn"))
    assert family.blocks == "decoder.layers"
    assert [path for path, _ in family.mixers] == ["attn", "ssm"]
    assert (family.mlp, family.embedding, family.head) == ("ffn", None, None)


def test_paths_with_an_unknown_key_suggest_the_right_one():
    with pytest.raises(UsageError, match=r"paths: unknown key. Did you mean 'mixer'\?"):
        family_of("llama", {"blocks": "model.layers", "mixxer": "self_attn"})


@pytest.mark.parametrize("paths", [{"blocks": "model.layers"}, {"mixer": "self_attn"}, {}])
def test_paths_without_blocks_or_mixer_are_refused(paths):
    with pytest.raises(UsageError, match="both blocks and mixer must be given"):
        family_of("llama", paths)
