"""Layout of a loaded or meta model: its blocks, mixers, MLPs, embedding, final norm and head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from xarch_kd.errors import TapError, UsageError, suggest
from xarch_kd.taps.families import ByKind, Family, family_of
from xarch_kd.taps.mamba_ssm import check_mask, is_mamba_ssm_model, mamba_ssm_family

SELECTIONS = ("mixers", "blocks", "embeddings", "norms", "head", "all")
# Detection of a mixer's kind outside the table: by the suffix of its class name, else by its parameters and modules.
MIXER_NAMES = {
    "LightningAttention": "lightning",
    "DeltaAttention": "kda",
    "GatedDeltaNet": "gated_delta",
    "RecurrentBlock": "rg_lru",
    "ShortConv": "short_convolution",
    # Of mamba_ssm.
    "MHA": "attention",
}
MIXER_SIGNS = {"mamba2": ("A_log", "D", "dt_bias"), "mamba": ("A_log", "D", "x_proj")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Resolved modules of `model`.

    `base` is the module whose forward ends with the final norm and does not run the head. `mixer_outputs` and
    `mlp_outputs` are the modules whose output, times `mixer_scales` or `mlp_scale`, is added to the residual stream.
    For a block that mixes tokens twice, `mixers` has the one that its family names. The logits are
    softcap(`logit_scale` · (hidden · `head_weight`ᵀ + `head_bias`)), softcap(x) = c · tanh(x / c) if c is not None.
    """

    model: PreTrainedModel
    base: nn.Module
    family: Family
    container: nn.ModuleList
    blocks: tuple[nn.Module, ...]
    mixers: tuple[nn.Module, ...]
    mixer_kinds: tuple[str, ...]
    mixer_outputs: tuple[nn.Module, ...]
    mlps: tuple[nn.Module, ...] | None
    mlp_outputs: tuple[nn.Module, ...] | None
    embedding: nn.Module
    final_norm: nn.Module | None
    head: nn.Module | None
    dim: int
    mixer_scales: tuple[float, ...]
    mlp_scale: float
    logit_scale: float
    logit_softcap: float | None

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [vocabulary, dim]. Raises TapError if the model has no head."""
        weight = getattr(self.head, "weight", None)
        if not isinstance(weight, Tensor):
            raise TapError(
                f"{type(self.model).__name__} has no output head with a weight, so it has no next-token distribution.",
                fix="load it as a causal language model, or name its head: `paths: {head: lm_head}`",
            )
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        """The head's bias, [vocabulary], or None."""
        bias = getattr(self.head, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def model_type(self) -> str:
        """The config's model type; `mamba_ssm` for a model of that package."""
        return getattr(self.model.config, "model_type", "mamba_ssm")

    def path_of(self, module: nn.Module) -> str:
        """Return the attribute path of `module` in the model, e.g. `model.layers.3.self_attn`."""
        return next(name for name, other in self.model.named_modules(remove_duplicate=False) if other is module)

    def mixer_parameter_names(self, layer: int) -> tuple[str, ...]:
        """Return the names, as in `model.named_parameters()`, of the parameters of the mixer of block `layer`."""
        return _names(self.model, {id(parameter) for parameter in self.mixers[layer].parameters()})


def layout_of(model: PreTrainedModel | Layout, paths: Mapping[str, str | None] | object | None = None) -> Layout:
    """Resolve the modules of `model`, on any device, the meta device included. A Layout is returned unchanged.

    `model` is a causal language model of transformers, or a `mamba_ssm.MambaLMHeadModel`.

    It refers to the model's current modules: resolve it again after wrapping or replacing blocks.

    Raises TapError if the type is unknown and no `paths` are given, or if a path does not exist.
    """
    if isinstance(model, Layout):
        return model
    # torch.compile(model) wraps the model.
    model = cast(PreTrainedModel, eager_module(model))
    is_foreign = is_mamba_ssm_model(model)
    family = mamba_ssm_family(model) if is_foreign else family_of(model.config.model_type, paths)
    container = _part(model, family.blocks, model)
    if not isinstance(container, nn.ModuleList):
        raise TapError(
            "The path of the blocks does not lead to a list of blocks.",
            asked=f"blocks: {family.blocks}",
            found=type(container).__name__,
            allowed="a torch.nn.ModuleList",
        )
    blocks = tuple(container)
    if not blocks:
        raise TapError(
            "The model has no blocks.",
            found=f"{family.blocks} is empty",
            allowed="one block or more",
            fix="compare the number of layers in config.json with the one that the weights were saved with",
        )
    mixers, kinds = zip(*(_mixer(eager_module(block), family, model) for block in blocks), strict=True)
    has_experts = family.experts is not None and any(_child(block, family.experts) is not None for block in blocks)
    mlps = None if has_experts else _each(blocks, kinds, family.mlp, model)
    embedding = _part(model, family.embedding, model) if family.embedding else model.get_input_embeddings()
    base: nn.Module = model.backbone if is_foreign else model.base_model  # type: ignore[assignment]
    head_path = None if base is model else family.head
    config: Any = model.config if is_foreign else model.config.get_text_config()
    return Layout(
        model=model,
        base=base,
        family=family,
        container=container,
        blocks=blocks,
        mixers=mixers,
        mixer_kinds=kinds,
        mixer_outputs=_each(blocks, kinds, family.mixer_output, model, mixers) or mixers,
        mlps=mlps,
        mlp_outputs=mlps and (_each(blocks, kinds, family.mlp_output, model, mlps) or mlps),
        embedding=embedding,
        final_norm=_part(model, family.final_norm, model) if family.final_norm else None,
        head=_part(model, head_path, model) if head_path else model.get_output_embeddings(),
        dim=int(config.d_model if is_foreign else config.hidden_size),
        mixer_scales=tuple(_scale(config, family.mixer_scale, kind) for kind in kinds),
        mlp_scale=_scale(config, family.mlp_scale, ""),
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
    )


def run_base(
    layout: Layout, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Run the model without its head on `input_ids` [batch, time] and return the final-normed hidden states.

    `position_ids` [batch, time] are those of rows that pack several documents, which are then kept apart.

    Raises TapError for a mask that the model does not support, and for packed rows that it would mix.
    """
    if position_ids is not None:
        _check_keeps_apart(layout, attention_mask)
        return layout.base(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
    if is_mamba_ssm_model(layout.model):
        check_mask(attention_mask)
        return layout.base(input_ids)
    return layout.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


def _check_keeps_apart(layout: Layout, attention_mask: Tensor | None) -> None:
    """Raise TapError unless the model keeps the documents of a packed row apart."""
    recurrent = sorted(set(layout.mixer_kinds) - {"attention"})
    if recurrent or attention_mask is not None:
        raise TapError(
            "The documents of a packed row would be mixed.",
            asked="position_ids that begin again within a row",
            found=f"mixers of kind {', '.join(recurrent)}, whose state runs through the whole row"
            if recurrent
            else "an attention_mask beside them, with which models of transformers do not look for documents",
            allowed="models of attention alone, and rows without padding",
            fix="give each document a row of its own, padded on the right: batch.apart()",
        )


def _logit_scale(config: PreTrainedConfig) -> float:
    factors = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
    return math.prod(float(factor) for factor in factors if factor) / float(getattr(config, "logits_scaling", 1.0))


def _scale(config: PreTrainedConfig, name: ByKind | None, kind: str) -> float:
    own = _by_kind(name, kind)
    return float(getattr(config, "residual_multiplier", 1.0) if own is None else getattr(config, own))


def head_logits(layout: Layout, head_input: Tensor) -> Tensor:
    """Return the logits [..., vocabulary] of final-normed hidden states [..., dim], as the model computes them."""
    weight = layout.head_weight
    logits = torch.nn.functional.linear(head_input.to(weight.dtype), weight, layout.head_bias) * layout.logit_scale
    cap = layout.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def trainable_names(
    model: PreTrainedModel, layout: Layout, selection: Sequence[str], mixer_layers: Sequence[int] | None = None
) -> tuple[str, ...]:
    """Return the names of the parameters that `selection` trains, in the order of `model.named_parameters()`.

    `mixers`: the mixers of `mixer_layers` (all when None); `blocks`: everything inside the blocks; `embeddings`;
    `norms`: every module whose class name has "Norm", those inside mixers included; `head`; `all`. A tied head and
    embedding are one parameter, under its first name.

    Raises UsageError for an unknown word or layer, TapError for a part that the model does not have.
    """
    for word in selection:
        if word not in SELECTIONS:
            raise UsageError(
                f"train: unknown part.{suggest(word, SELECTIONS)}", asked=word, allowed=", ".join(SELECTIONS)
            )
    wanted: set[int] = set()
    for word in selection:
        modules = _selected(layout, word, mixer_layers)
        parameters = {id(parameter) for module in modules for parameter in module.parameters()}
        if not parameters:
            raise TapError(
                f"train: {type(layout.model).__name__} has no parameters of the part that was asked for.",
                asked=word,
                allowed=", ".join(SELECTIONS),
            )
        wanted |= parameters
    return _names(eager_module(model), wanted)


def checked_layers(layout: Layout, layers: Sequence[int]) -> tuple[int, ...]:
    """Return `layers` sorted and without duplicates. Raises UsageError for one that the model does not have."""
    count = len(layout.blocks)
    for layer in layers:
        if not 0 <= layer < count:
            raise UsageError(
                "A layer is out of range.",
                asked=layer,
                found=f"{layout.model_type} with {count} blocks",
                allowed=f"0 to {count - 1}",
            )
    return tuple(sorted(set(layers)))


def eager_module(module: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of `torch.compile(module)`; any other module unchanged."""
    return getattr(module, "_orig_mod", module)


def _selected(layout: Layout, word: str, mixer_layers: Sequence[int] | None) -> Iterator[nn.Module]:
    if word == "mixers":
        chosen = range(len(layout.mixers)) if mixer_layers is None else checked_layers(layout, mixer_layers)
        yield from (layout.mixers[layer] for layer in chosen)
    elif word == "norms":
        yield from (module for module in layout.base.modules() if "norm" in type(module).__name__.lower())
    elif word == "head" and layout.head is None:
        return
    else:
        parts = {
            "all": (layout.model,),
            "blocks": layout.blocks,
            "embeddings": (layout.embedding,),
            "head": (layout.head,),
        }
        yield from (module for module in parts[word] if module is not None)


def _names(model: nn.Module, wanted: set[int]) -> tuple[str, ...]:
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)


def _by_kind(value: ByKind | None, kind: str) -> str | None:
    return value.get(kind) if isinstance(value, Mapping) else value


def _each(
    blocks: Sequence[nn.Module],
    kinds: Sequence[str],
    path: ByKind | None,
    model: PreTrainedModel,
    otherwise: Sequence[nn.Module] = (),
) -> tuple[nn.Module, ...] | None:
    """Return the module at `path` of each block; if the block's kind has none, that of `otherwise`."""
    if path is None:
        return None
    own = [_by_kind(path, kind) for kind in kinds]
    return tuple(
        otherwise[index] if name is None else _part(eager_module(block), name, model)
        for index, (block, name) in enumerate(zip(blocks, own, strict=True))
    )


def _child(block: nn.Module, path: str) -> nn.Module | None:
    """Return the first module on `path` that `block` has, if any: some families set missing ones to None."""
    child = getattr(eager_module(block), path.split(".")[0], None)
    return child if isinstance(child, nn.Module) else None


def _mixer(block: nn.Module, family: Family, model: PreTrainedModel) -> tuple[nn.Module, str]:
    chosen = next((mixer for mixer in family.mixers if _child(block, mixer[0]) is not None), family.mixers[-1])
    mixer = _part(block, chosen[0], model)
    return mixer, chosen[1] or _kind(mixer)


def _kind(mixer: nn.Module) -> str:
    inner = eager_module(mixer)
    named = next((kind for ending, kind in MIXER_NAMES.items() if type(inner).__name__.endswith(ending)), None)
    if named is not None:
        return named
    if any(word in type(inner).__name__.lower() for word in ("attention", "attn")):
        return "attention"
    return next((kind for kind, signs in MIXER_SIGNS.items() if all(hasattr(inner, sign) for sign in signs)), "other")


def _part(root: nn.Module, path: str, model: PreTrainedModel) -> nn.Module:
    """Return the module at `path` under `root`. For a base model (no head) its prefix is removed from the path."""
    names = path.split(".")
    if root is model and getattr(model, "base_model", None) is model and names[0] == model.base_model_prefix:
        names = names[1:]
    module: nn.Module = root
    for name in names:
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            inside = ", ".join(child_name for child_name, _ in module.named_children())
            raise TapError(
                f"A path leads nowhere in {type(root).__name__}.{suggest(name, dict(module.named_children()))}",
                asked=path,
                found=f"{type(module).__name__} with {inside}",
                fix="correct it under `paths:` in the mapping file; print(model) shows the names",
            )
        module = child
    return module
