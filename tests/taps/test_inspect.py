from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import TapError
from xarch_kd.taps.families import FAMILIES
from xarch_kd.taps.inspect import inspect_model
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.trace import trace

BLOCK_TAPS = ("hidden", "mixer_input", "mixer_output", "mlp_output")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_row_holds_in_a_traced_model(model_type, build, build_meta, input_ids):
    rows = inspect_model(build_meta(model_type))
    model = build(model_type)
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in rows:
        found = trace(model, input_ids, taps={row.tap: row.layers or None})
        if row.tap == "mixing":
            assert row.shape == ("batch", "heads", "time", "time")
            assert [mixing.dense().shape[2:] for mixing in found["mixing"].values()] == [(13, 13)] * len(row.layers)
            continue
        if row.tap == "values":
            assert row.shape == ("batch", "time", "heads", "dim")
            assert [(value.dim(), *value.shape[:2]) for value in found["values"].values()] == [(4, 2, 13)] * len(
                row.layers
            )
            continue
        tensors = list(found[row.tap].values()) if row.tap in BLOCK_TAPS else [found[row.tap]]
        assert [tuple(tensor.shape) for tensor in tensors] == [(2, 13, row.shape[2])] * len(tensors)
        assert all(row.module.replace("*", str(layer)) in modules for layer in row.layers or (0,))
    assert sorted({layer for row in rows if row.tap == "mixer_output" for layer in row.layers}) == list(
        range(model.config.num_hidden_layers)
    )


def test_a_meta_model_keeps_its_meta_weights(build_meta):
    model = build_meta("llama")
    inspect_model(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert layout_of(model).head_weight.device == torch.device("meta")


def test_a_config_gives_the_same_rows_as_its_model(build):
    model = build("bamba")
    assert inspect_model(model.config) == inspect_model(model)


def test_the_rows_of_a_bamba(build_meta):
    rows = inspect_model(build_meta("bamba"))
    said = [(row.tap, row.layers, row.module, row.reads, row.kind) for row in rows]
    assert said == [
        ("embedding", (), "model.layers.0", "input", None),
        ("hidden", (0, 1, 2), "model.layers.*", "output", None),
        ("mixer_input", (0, 2), "model.layers.*.mamba", "input", "mamba2"),
        ("mixer_output", (0, 2), "model.layers.*.mamba", "output", "mamba2"),
        ("mixing", (0, 2), "model.layers.*.mamba", "inside", "mamba2"),
        ("values", (0, 2), "model.layers.*.mamba", "inside", "mamba2"),
        ("mixer_input", (1,), "model.layers.*.self_attn", "input", "attention"),
        ("mixer_output", (1,), "model.layers.*.self_attn", "output", "attention"),
        ("mixing", (1,), "model.layers.*.self_attn", "inside", "attention"),
        ("values", (1,), "model.layers.*.self_attn", "inside", "attention"),
        ("mlp_output", (0, 1, 2), "model.layers.*.feed_forward", "output", None),
        ("head_input", (), "model.final_layernorm", "output", None),
    ]
    assert {row.shape for row in rows if row.reads != "inside"} == {("batch", "time", 64)}


def test_a_mamba_lists_no_mlp(build_meta):
    assert "mlp_output" not in {row.tap for row in inspect_model(build_meta("mamba"))}


def test_an_unknown_type_needs_paths(build_meta):
    model = build_meta("starcoder2")
    with pytest.raises(TapError, match=r"paths: \{blocks: model\.layers"):
        inspect_model(model)
    rows = inspect_model(model, {"blocks": "model.layers", "mixer": "self_attn"})
    expected = ["embedding", "hidden", "mixer_input", "mixer_output", "mixing", "values", "head_input"]
    assert [row.tap for row in rows] == expected
    assert rows[2].kind == "attention"
