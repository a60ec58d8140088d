"""Table of the families whose own class can hold a recurrent mixer, with the location of their attention.

Classes are named as transformers names them. Nothing is imported here, and nothing else of this package in
`configs.py`, so that the classes can be registered in the middle of any import of either package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class InPlaceTeacher:
    """A family whose class can hold a recurrent mixer.

    `blocks` is the attribute of the base model, `mixer` that of a block. With `masks_by_type` the base model takes a
    mask for each type of layer, else one mask for all. `attention` is the layout of the weights: in four projections,
    or queries, keys and values in one, head by head or transposed. `norm_offset` is added to every norm's weight.
    """

    config: str
    base: str
    model: str
    blocks: str = "layers"
    mixer: str = "self_attn"
    masks_by_type: bool = True
    attention: Literal["separate", "fused_heads", "transposed"] = "separate"
    norm_offset: float = 0.0


# Mixer that needs no class of its own: the teacher's attention through a window.
WINDOW = "window"

IN_PLACE_TEACHERS: dict[str, InPlaceTeacher] = {
    "gemma2": InPlaceTeacher(config="Gemma2Config", base="Gemma2Model", model="Gemma2ForCausalLM", norm_offset=1.0),
    "gemma3_text": InPlaceTeacher(
        config="Gemma3TextConfig", base="Gemma3TextModel", model="Gemma3ForCausalLM", norm_offset=1.0
    ),
    "qwen3": InPlaceTeacher(config="Qwen3Config", base="Qwen3Model", model="Qwen3ForCausalLM"),
    "smollm3": InPlaceTeacher(config="SmolLM3Config", base="SmolLM3Model", model="SmolLM3ForCausalLM"),
    "mistral": InPlaceTeacher(
        config="MistralConfig",
        base="MistralModel",
        model="MistralForCausalLM",
        masks_by_type=False,
    ),
    "gpt2": InPlaceTeacher(
        config="GPT2Config",
        base="GPT2Model",
        model="GPT2LMHeadModel",
        blocks="h",
        mixer="attn",
        masks_by_type=False,
        attention="transposed",
    ),
    "gpt_neox": InPlaceTeacher(
        config="GPTNeoXConfig",
        base="GPTNeoXModel",
        model="GPTNeoXForCausalLM",
        mixer="attention",
        masks_by_type=False,
        attention="fused_heads",
    ),
}

# Families that stock classes hold with recurrent mixers, and no stock class with a window that has sinks.
WINDOW_TEACHERS: dict[str, InPlaceTeacher] = {
    "llama": InPlaceTeacher(config="LlamaConfig", base="LlamaModel", model="LlamaForCausalLM", masks_by_type=False),
    "qwen2": InPlaceTeacher(config="Qwen2Config", base="Qwen2Model", model="Qwen2ForCausalLM"),
}
ALL_TEACHERS: dict[str, InPlaceTeacher] = {**IN_PLACE_TEACHERS, **WINDOW_TEACHERS}
