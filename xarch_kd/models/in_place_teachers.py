"""The families whose own class can hold a recurrent mixer, and where each keeps its attention: one visible table.

Nothing of this package is imported here or in `in_place_classes.py`, so that the classes can be registered whenever
transformers' own table of classes is loaded, in the middle of an import of this package too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3Model


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family whose class can hold a recurrent mixer.

    `blocks` is the attribute of the base model, `mixer` that of a block. With `masks_by_type` the base model takes a
    mask for each type of layer, else one mask for all. `attention` says how the weights are kept: in four projections,
    or queries, keys and values in one, head by head or transposed. `norm_offset` is added to every norm's weight.
    """

    config: type[PreTrainedConfig]
    base: type[PreTrainedModel]
    model: type[PreTrainedModel]
    blocks: str = "layers"
    mixer: str = "self_attn"
    masks_by_type: bool = True
    attention: Literal["separate", "fused_heads", "transposed"] = "separate"
    norm_offset: float = 0.0


FAMILIES: dict[str, Family] = {
    "gemma2": Family(config=Gemma2Config, base=Gemma2Model, model=Gemma2ForCausalLM, norm_offset=1.0),
    "gemma3_text": Family(config=Gemma3TextConfig, base=Gemma3TextModel, model=Gemma3ForCausalLM, norm_offset=1.0),
    "qwen3": Family(config=Qwen3Config, base=Qwen3Model, model=Qwen3ForCausalLM),
    "smollm3": Family(config=SmolLM3Config, base=SmolLM3Model, model=SmolLM3ForCausalLM),
    "mistral": Family(
        config=MistralConfig,
        base=MistralModel,
        model=MistralForCausalLM,
        masks_by_type=False,
    ),
    "gpt2": Family(
        config=GPT2Config,
        base=GPT2Model,
        model=GPT2LMHeadModel,
        blocks="h",
        mixer="attn",
        masks_by_type=False,
        attention="transposed",
    ),
    "gpt_neox": Family(
        config=GPTNeoXConfig,
        base=GPTNeoXModel,
        model=GPTNeoXForCausalLM,
        mixer="attention",
        masks_by_type=False,
        attention="fused_heads",
    ),
}
