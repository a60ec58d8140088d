"""Weights under the names of `mamba_ssm.MambaLMHeadModel` and of the stock classes: renamed, joined or split.

Attention has one input projection there, of the rows of q, k and v. The MLP's is of the rows of up and then gate, each
padded with zeros to a multiple of 128, which add nothing and get no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig

from xarch_kd.models.loading.fit import check_placed
from xarch_kd.models.mamba_ssm.granitemoehybrid import equal_bamba_config, equal_bamba_state
from xarch_kd.taps.mamba_ssm import is_mamba_ssm_model

MULTIPLE = 128
# Modules outside the blocks, and inside a block of Bamba or GraniteMoeHybrid: stock → mamba_ssm. Where several have
# one, its rows are theirs in this order.
OUTSIDE = {
    "model.embed_tokens": "backbone.embedding",
    "model.final_layernorm": "backbone.norm_f",
    "model.norm": "backbone.norm_f",
    "backbone.embeddings": "backbone.embedding",
}
INSIDE = {
    "input_layernorm": "norm",
    "pre_ff_layernorm": "norm2",
    "post_attention_layernorm": "norm2",
    "self_attn.q_proj": "mixer.in_proj",
    "self_attn.k_proj": "mixer.in_proj",
    "self_attn.v_proj": "mixer.in_proj",
    "self_attn.o_proj": "mixer.out_proj",
    "feed_forward.up_proj": "mlp.fc1",
    "feed_forward.gate_proj": "mlp.fc1",
    "feed_forward.down_proj": "mlp.fc2",
    "shared_mlp.input_linear": "mlp.fc1",
    "shared_mlp.output_linear": "mlp.fc2",
    "mamba": "mixer",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def mamba_ssm_name(name: str) -> str:
    """Return the name in mamba_ssm's model of a stock parameter, or of the parameter that holds its rows."""
    block = _BLOCK.fullmatch(name)
    inside = block[2] if block else name
    for own, other in (INSIDE if block else OUTSIDE).items():
        if inside.startswith(f"{own}."):
            inside = other + inside.removeprefix(own)
            break
    return f"backbone.layers.{block[1]}.{inside}" if block else inside


def own_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names in `model` of the stock parameters `names`; they differ in `mamba_ssm.MambaLMHeadModel`."""
    return [mamba_ssm_name(name) for name in names] if is_mamba_ssm_model(model) else list(names)


def mamba_ssm_state(state: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return a stock state dict under mamba_ssm's names; tensors that are only renamed are not copied."""
    if config.model_type == "granitemoehybrid":
        state, config = equal_bamba_state(state, config), equal_bamba_config(config)
    rows: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        rows.setdefault(mamba_ssm_name(name), {})[name] = value
    found: dict[str, Tensor] = {}
    for name, parts in rows.items():
        ordered = [parts[part] for part in sorted(parts, key=_rank)]
        if ".mlp." in name:
            ordered = [_padded(part, name) for part in ordered]
        found[name] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["backbone.embedding.weight"]
    return found


def _rank(name: str) -> int:
    block = _BLOCK.fullmatch(name)
    ranks = (rank for rank, own in enumerate(INSIDE) if block and block[2].startswith(f"{own}."))
    return next(ranks, 0)


def _padded(weight: Tensor, name: str) -> Tensor:
    """Pad fc2's columns, or one half of fc1's rows, to a multiple of 128."""
    size = weight.shape[1] if ".fc2." in name else weight.shape[0]
    missing = -size % MULTIPLE
    return functional.pad(weight, (0, missing) if ".fc2." in name else (0, 0, 0, missing))


def stock_state(state: Mapping[str, Tensor], config: PreTrainedConfig, *, where: str) -> dict[str, Tensor]:
    """Return mamba_ssm's state dict under the names of the stock class of `config`, which it must fit.

    Raises `ModelError` naming `where` for a weight that is missing, left over or of another shape.
    """
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    rows: dict[str, list[str]] = {}
    for name in shapes:
        rows.setdefault(mamba_ssm_name(name), []).append(name)
    given = dict(state)
    if config.tie_word_embeddings and "backbone.embedding.weight" in given:
        given["lm_head.weight"] = given["backbone.embedding.weight"]
    found: dict[str, Tensor] = {}
    missing = []
    for name, parts in rows.items():
        parts.sort(key=_rank)
        value = given.pop(name, None)
        if value is None and name.endswith("_proj.bias"):
            # mamba_ssm can have a bias in one projection of an attention and none in the other.
            value = torch.zeros(sum(shapes[part].numel() for part in parts))
        if value is None:
            missing.append(name)
            continue
        found |= dict(zip(parts, _split(name, value, [shapes[part] for part in parts]), strict=True))
    wrong = []
    for name, parts in rows.items():
        if any(part in found and found[part].shape != shapes[part] for part in parts):
            wanted = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            wrong.append((name, state[name].shape, wanted))
    check_placed({"missing_keys": missing, "unexpected_keys": given, "mismatched_keys": wrong}, config, where=where)
    return found


def _split(name: str, value: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Return the parts of one of mamba_ssm's tensors, without the padding of an MLP."""
    if ".mlp.fc1." in name:
        return [half[: shape[0]] for half, shape in zip(value.chunk(2), shapes, strict=True)]
    if ".mlp.fc2." in name:
        return [value[:, : shapes[0][1]]]
    sizes = [shape[0] for shape in shapes]
    return list(value.split(sizes)) if len(shapes) > 1 and sum(sizes) == value.shape[0] else [value] * len(shapes)


def widened_mlp(state: Mapping[str, Tensor], config: PreTrainedConfig) -> int | None:
    """Return the padded width of the MLPs if padding somewhere is not zero, as after training with weight noise."""
    size = getattr(config, "intermediate_size", 0)
    for name, outer in state.items():
        if not name.endswith(".mlp.fc2.weight"):
            continue
        inner = state.get(name.replace(".fc2.", ".fc1."), outer[:0])
        padding = [half[size:] for half in inner.chunk(2)] + [outer[:, size:]]
        # A channel of which one of the three is zero adds nothing.
        if all(bool(part.any()) for part in padding):
            return outer.shape[1]
    return None
