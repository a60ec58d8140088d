"""A teacher's own classes with recurrent mixers in some of their blocks: base models and language models.

One of each is made for every row of `teachers.py`. A replaced block is the teacher's block, norms and
MLP included, with one of transformers' mixers in place of its attention. Its cache is transformers' too: the
config's `layer_types` are `linear_attention` there, as those of Bamba and Qwen3.5 do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_masks_for_generate, create_recurrent_attention_mask
from transformers.models.bamba.modeling_bamba import BambaMixer, BambaRMSNormGated
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5RMSNormGated

from xarch_kd.models.in_place.configs import CONFIGS, RECURRENT
from xarch_kd.models.in_place.teachers import ALL_TEACHERS, WINDOW, InPlaceTeacher
from xarch_kd.models.in_place.window import ARGUMENT, through_window, window_inputs

# Boundaries of the sequences in a packed row, an argument of the mixers' kernels.
PACKING = ("seq_idx", "cu_seq_lens_q")


class InPlaceMamba2(BambaMixer):
    """Bamba's Mamba-2 mixer, called as attention is."""

    def __init__(self, config: Any, layer: int) -> None:
        mixer_config = BambaConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            attn_layer_indices=[index for index in range(config.num_hidden_layers) if index != layer],
            **config.mixer_settings,
        )
        super().__init__(mixer_config, layer)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the addition to the residual stream, [batch, time, hidden size], and no attention map."""
        return super().forward(hidden_states, **mixer_arguments(kwargs)), None


class InPlaceGatedDeltaNet(Qwen3_5GatedDeltaNet):
    """Qwen3.5's gated-delta mixer, called as attention is."""

    def __init__(self, config: Any, layer: int) -> None:
        mixer_config = Qwen3_5TextConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            layer_types=[RECURRENT] * config.num_hidden_layers,
            **config.mixer_settings,
        )
        super().__init__(mixer_config, layer)  # type: ignore[arg-type]  # the text part of Qwen3.5's config

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the addition to the residual stream, [batch, time, hidden size], and no attention map."""
        return super().forward(hidden_states, **mixer_arguments(kwargs)), None


MIXER_CLASSES: dict[str, type[nn.Module]] = {"mamba2": InPlaceMamba2, "gated_delta": InPlaceGatedDeltaNet}


def mixer_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mixer's arguments, out of those that a block passes to its attention."""
    caches = (given.get(name) for name in ("past_key_values", "layer_past"))
    packing = {name: given[name] for name in PACKING if given.get(name) is not None}
    return {
        "cache_params": next((cache for cache in caches if cache is not None), None),
        "attention_mask": given.get("padding_mask"),
        **packing,
    }


class InPlaceBase(PreTrainedModel):
    """A teacher's base model, with mixers in the replaced blocks."""

    config: Any
    family: InPlaceTeacher
    # Recurrent states cannot be rolled back, which assisted generation would need.
    _is_stateful = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        blocks = getattr(self, self.family.blocks)
        for layer in config.replaced_layers:
            if config.mixer == WINDOW:
                through_window(getattr(blocks[layer], self.family.mixer))
            else:
                setattr(blocks[layer], self.family.mixer, MIXER_CLASSES[config.mixer](config, layer))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the teacher's forward with `padding_mask` [batch, time] for the mixers in addition to its own masks."""
        # Masks are made from the sizes, device and type of an embedding alone.
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        meta = torch.empty((*tokens.shape[:2], 0), dtype=self.dtype, device=tokens.device)
        if self.config.mixer == WINDOW and self.config.replaced_layers:
            use_cache = kwargs.get("use_cache")
            past_key_values, kwargs[ARGUMENT] = window_inputs(
                self.config,
                meta,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=past_key_values,
                use_cache=self.config.use_cache if use_cache is None else use_cache,
            )
        if isinstance(attention_mask, dict):
            padding = attention_mask.get(RECURRENT)
            if not self.family.masks_by_type:
                attention_mask = next((mask for kind, mask in attention_mask.items() if kind != RECURRENT), None)
        else:
            padding = create_recurrent_attention_mask(self.config, meta, attention_mask)
            if self.family.masks_by_type:
                attention_mask = create_masks_for_generate(
                    self.config, meta, attention_mask, past_key_values, position_ids=position_ids
                )
        return super().forward(
            input_ids,  # type: ignore[arg-type]  # the forward of the teacher's class
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            padding_mask=padding,
            **kwargs,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_mixer(module):
            super()._init_weights(module)


class InPlaceCausalLM(PreTrainedModel):
    """A teacher's language model on an `InPlaceBase`."""

    config: Any
    base_class: type[PreTrainedModel]
    _is_stateful = True

    def __init__(self, config: Any) -> None:
        # Not the teacher's own __init__, which would build the teacher's own base model.
        PreTrainedModel.__init__(self, config)
        setattr(self, self.base_model_prefix, self.base_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_mixer(module):
            super()._init_weights(module)


def init_mixer(module: nn.Module) -> bool:
    """Initialize the parameters of a mixer as its class does; return True if `module` is a mixer.

    The teacher's rule would treat a gated norm as one of its own and may set its weight to 0.
    """
    if isinstance(module, BambaMixer):
        module.init_bamba_weights()
    elif isinstance(module, Qwen3_5GatedDeltaNet):
        initialization.ones_(module.dt_bias)
        initialization.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())
    elif isinstance(module, BambaRMSNormGated | Qwen3_5RMSNormGated):
        initialization.ones_(module.weight)
    else:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class InPlaceClasses:
    """The classes of one family."""

    config: type[PreTrainedConfig]
    base: type[PreTrainedModel]
    model: type[PreTrainedModel]


def make_classes(model_type: str, family: InPlaceTeacher) -> InPlaceClasses:
    """Return new classes `InPlace…` for a family."""
    own = {"__module__": __name__, "family": family}

    def made(kind: type, name: str, **attributes: Any) -> Any:
        teacher = getattr(transformers, name)
        documented = f"{name} with recurrent mixers in some of its blocks."
        return type(f"InPlace{name}", (kind, teacher), {"__doc__": documented, **own, **attributes})

    config = CONFIGS[model_type]
    base = made(InPlaceBase, family.base, config_class=config)
    model = made(InPlaceCausalLM, family.model, config_class=config, base_class=base)
    return InPlaceClasses(config=config, base=base, model=model)


CLASSES: dict[str, InPlaceClasses] = {name: make_classes(name, family) for name, family in ALL_TEACHERS.items()}


def register() -> None:
    """Register the classes with `AutoModel` and `AutoModelForCausalLM`, in place of their stand-ins; idempotent."""
    for classes in CLASSES.values():
        AutoModel.register(classes.config, classes.base, exist_ok=True)
        AutoModelForCausalLM.register(classes.config, classes.model, exist_ok=True)


def __getattr__(name: str) -> type:
    """Return a made class by its name, as pickle looks it up."""
    for made in CLASSES.values():
        for found in (made.base, made.model):
            if found.__name__ == name:
                return found
    raise AttributeError(f"module {__name__} has no attribute {name}")


register()
