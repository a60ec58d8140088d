"""Canonical view of a teacher's weights: separate projections, plain norms, multipliers folded in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xarch_kd.errors import ConversionError, ModelError
from xarch_kd.models.conversion.teacher_spec import TeacherSpec

# Types of quantized values that are kept in buffers.
_CODES: Final = (torch.int32, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """Linear map: `weight` [out, in], `bias` [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def scaled(self, factor: float) -> LinearWeights:
        """Return the projection times `factor`; the very same tensors if that is 1."""
        if factor == 1.0:
            return self
        bias = None if self.bias is None else widened(self.bias) * factor
        return LinearWeights(weight=widened(self.weight) * factor, bias=bias)


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Weights of an attention: o(attention(q, k, v of norm(x))), or the norm of o(…), depending on the spec.

    `query` [heads × head_dim, width], `key` and `value` [key_value_heads × head_dim, width], `mixer_norm` [width]. The
    norms of queries and keys are [head_dim], or as wide as all their heads, or None.
    """

    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    output: LinearWeights
    mixer_norm: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockWeights(AttentionWeights):
    """Weights of a block: x + attention, then x + down(act(gate) × up), with the second norm before or after it."""

    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    mlp_norm: Tensor


class TeacherWeights:
    """A teacher's weights under canonical names, with its four multipliers folded into them.

    The fold: embedding × embedding_scale; q × attention_scale × √head_dim; o and down × residual_scale; head ×
    logit_scale. If a multiplier is 1 the tensors are the teacher's own, not copies. Blocks are built on demand.
    """

    def __init__(self, teacher: PreTrainedModel, spec: TeacherSpec) -> None:
        self.spec = spec
        self._state: dict[str, Tensor] = teacher.state_dict()
        self._read: set[str] = set()

    @property
    def embedding(self) -> Tensor:
        """[vocabulary, width]."""
        return _times(self._take("model.embed_tokens.weight"), self.spec.embedding_scale)

    @property
    def final_norm(self) -> Tensor:
        """[width]."""
        return self._norm("model.norm")

    @property
    def head(self) -> Tensor:
        """[vocabulary, width]; the embedding's own rows if the teacher ties them."""
        name = "model.embed_tokens.weight" if self.spec.tied else "lm_head.weight"
        self._read.add("lm_head.weight")
        return _times(self._take(name), self.spec.logit_scale)

    def block(self, index: int) -> BlockWeights:
        """Return the weights of block `index`."""
        spec, place = self.spec, f"model.layers.{index}"
        if spec.model_type == "phi3":
            size = spec.key_value_heads * spec.head_dim
            query, key, value = self._split(f"{place}.self_attn.qkv_proj", (spec.heads * spec.head_dim, size, size))
            gate, up = self._split(f"{place}.mlp.gate_up_proj", (spec.intermediate, spec.intermediate))
        else:
            query, key, value = (self._projection(f"{place}.self_attn.{name}_proj") for name in ("q", "k", "v"))
            gate, up = (self._projection(f"{place}.mlp.{name}_proj") for name in ("gate", "up"))
        mixer_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
        if spec.norm_after:
            mixer_norm, mlp_norm = "post_attention_layernorm", "post_feedforward_layernorm"
        query_scale = spec.attention_scale / spec.head_dim**-0.5
        return BlockWeights(
            query=query.scaled(query_scale),
            key=key,
            value=value,
            output=self._projection(f"{place}.self_attn.o_proj").scaled(spec.residual_scale),
            gate=gate,
            up=up,
            down=self._projection(f"{place}.mlp.down_proj").scaled(spec.residual_scale),
            mixer_norm=self._norm(f"{place}.{mixer_norm}"),
            mlp_norm=self._norm(f"{place}.{mlp_norm}"),
            query_norm=None if spec.query_key_norm is None else self._norm(f"{place}.self_attn.q_norm"),
            key_norm=None if spec.query_key_norm is None else self._norm(f"{place}.self_attn.k_norm"),
        )

    def unread(self) -> tuple[str, ...]:
        """Return the names of the weights that nothing above has read so far."""
        return tuple(sorted(set(self._state) - self._read))

    def _take(self, name: str) -> Tensor:
        if name not in self._state:
            raise ConversionError(
                f"The {self.spec.model_type} teacher has no weight {name}.",
                found=", ".join(sorted(self._state)[:4]) + ", …",
                fix="load it as a causal language model, with load_model or AutoModelForCausalLM",
            )
        self._read.add(name)
        return self._state[name]

    def _projection(self, place: str) -> LinearWeights:
        bias = self._take(f"{place}.bias") if f"{place}.bias" in self._state else None
        return LinearWeights(weight=self._take(f"{place}.weight"), bias=bias)

    def _split(self, place: str, sizes: tuple[int, ...]) -> list[LinearWeights]:
        return [LinearWeights(weight=part, bias=None) for part in self._take(f"{place}.weight").split(sizes)]

    def _norm(self, place: str) -> Tensor:
        weight = self._take(f"{place}.weight")
        return weight if self.spec.norm_offset == 0.0 else widened(weight) + self.spec.norm_offset


def widened(weight: Tensor) -> Tensor:
    """Return a weight in at least float32, so that what is folded into it is not rounded to a narrower type."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _times(weight: Tensor, factor: float) -> Tensor:
    return weight if factor == 1.0 else widened(weight) * factor


def check_plain(model: PreTrainedModel) -> None:
    """Raise `ConversionError` for a quantized teacher, whose weights are of another class or not floating point.

    GPTQ and AWQ keep their values in integer buffers.
    """
    codes = ((name, value) for name, value in model.named_buffers() if value.dtype in _CODES and value.ndim > 1)
    for name, value in (*model.named_parameters(), *codes):
        if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point() or value.element_size() == 1:
            raise ConversionError(
                "Conversion takes full-precision weights only, and the teacher is quantized.",
                found=f"{name}: {type(value).__name__} of {value.dtype}",
                fix="load the checkpoint that it was quantized from",
            )


def check_finite(state: Mapping[str, Tensor], *, what: str) -> None:
    """Raise `ModelError` naming the first tensors that hold NaN or infinity."""
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ModelError(f"{what} holds NaN or infinite weights.", found=", ".join(broken[:4]))
