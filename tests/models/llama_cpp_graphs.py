"""Graphs of llama.cpp for a GGUF file in numpy: one sequence, token by token where recurrent.

Written from `src/models/*.cpp` of https://github.com/ggml-org/llama.cpp. Only the file is read, by the package gguf.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Architectures whose rotary pairs are neighbours (LLAMA_ROPE_TYPE_NORM); the others' are half a head apart.
NEIGHBOURS = ("llama", "granite", "granitehybrid", "smollm3")


class GgufContent:
    """Metadata of a file by key without the architecture's prefix, and its tensors in float64."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = {name: entry.contents() for name, entry in reader.fields.items()}
        self.architecture: str = fields["general.architecture"]
        self.metadata: Mapping[str, Any] = {
            name.removeprefix(f"{self.architecture}."): value for name, value in fields.items()
        }
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """ggml_ssm_conv on [time, channels] with a kernel [channels, taps], zeros before the first token."""
    taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return np.stack([(padded[step : step + taps] * kernel.T).sum(axis=0) for step in range(len(x))])


class Graph:
    """One architecture's graph over a file's content."""

    def __init__(self, path: Path) -> None:
        content = GgufContent(path)
        self.architecture, self.tensors, self.kinds = content.architecture, content.tensors, content.kinds
        self.key = content.metadata
        self.eps = self.key["attention.layer_norm_rms_epsilon"]
        self.used: set[str] = set()

    def get(self, name: str) -> np.ndarray:
        self.used.add(name)
        return self.tensors[name]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.get(f"{name}.weight").T
        return y + self.get(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, self.eps) * self.get(f"{name}.weight")

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits [time, vocabulary] of one sequence; every tensor of the file must have been used."""
        x = self.get("token_embd.weight")[tokens] * self.key.get("embedding_scale", 1.0)
        if self.architecture == "gemma":
            x = x * np.sqrt(x.shape[-1])
        for block in range(self.key["block_count"]):
            place = f"blk.{block}"
            mixed = self.mixer(self.norm(x, f"{place}.attn_norm"), block)
            x = x + mixed * self.key.get("residual_scale", 1.0)
            if self.architecture == "mamba2":
                continue
            name = "post_attention_norm" if self.architecture == "qwen35" else "ffn_norm"
            mapped = self.feed_forward(self.norm(x, f"{place}.{name}"), place)
            x = x + mapped * self.key.get("residual_scale", 1.0)
        head = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        logits = self.norm(x, "output_norm") @ self.get(head).T / self.key.get("logit_scale", 1.0)
        assert self.used == set(self.tensors), "tensors that the graph does not read"
        return logits

    def feed_forward(self, x: np.ndarray, place: str) -> np.ndarray:
        if f"{place}.ffn_gate.weight" not in self.tensors:
            gate, up = np.split(self.linear(x, f"{place}.ffn_up"), 2, axis=-1)
        else:
            gate, up = self.linear(x, f"{place}.ffn_gate"), self.linear(x, f"{place}.ffn_up")
        activation = gelu if self.architecture == "gemma" else silu
        return self.linear(activation(gate) * up, f"{place}.ffn_down")

    def mixer(self, x: np.ndarray, block: int) -> np.ndarray:
        if self.architecture == "mamba2":
            return self.mamba2(x, f"blk.{block}")
        if self.architecture == "granitehybrid" and self.key["attention.head_count_kv"][block] == 0:
            return self.mamba2(x, f"blk.{block}")
        if self.architecture == "qwen35":
            listed = self.key.get("attention.recurrent_layers")
            interval = self.key.get("full_attention_interval", 4)
            if listed[block] if listed is not None else (block + 1) % interval != 0:
                return self.gated_delta(x, f"blk.{block}")
        return self.attention(x, block)

    def attention(self, x: np.ndarray, block: int) -> np.ndarray:
        place, heads, key_heads = f"blk.{block}", self.key["attention.head_count"], self.key["attention.head_count_kv"]
        key_heads = key_heads[block] if isinstance(key_heads, list) else key_heads
        size = self.key["attention.key_length"]
        if f"{place}.attn_qkv.weight" in self.tensors:
            rows = np.cumsum([heads * size, key_heads * size])
            query, key, value = np.split(self.linear(x, f"{place}.attn_qkv"), rows, axis=-1)
        else:
            query, key, value = (self.linear(x, f"{place}.attn_{name}") for name in "qkv")
        gate = None
        query = query.reshape(len(x), heads, -1)
        if self.architecture == "qwen35":
            query, gate = query[..., :size], query[..., size:]
        key, value = key.reshape(len(x), key_heads, size), value.reshape(len(x), key_heads, size)
        if f"{place}.attn_q_norm.weight" in self.tensors:
            query, key = self.norm(query, f"{place}.attn_q_norm"), self.norm(key, f"{place}.attn_k_norm")
        is_rotated = self.key.get("rope.scaling.finetuned", True)
        if is_rotated and not (self.architecture == "smollm3" and (block + 1) % 4 == 0):
            query, key = self.rotated(query), self.rotated(key)
        key, value = (np.repeat(part, heads // key_heads, axis=1) for part in (key, value))
        scores = np.einsum("thd,shd->hts", query, key) * self.key.get("attention.scale", size**-0.5)
        scores = np.where(np.tril(np.ones(scores.shape[1:], dtype=bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, value)
        mixed = mixed if gate is None else mixed * sigmoid(gate)
        return self.linear(mixed.reshape(len(x), -1), f"{place}.attn_output")

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """ggml_rope_ext, or ggml_rope_multi with the positions of text."""
        count = self.key["rope.dimension_count"] // 2
        frequencies = self.key["rope.freq_base"] ** -(np.arange(count) / count)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.get("rope_freqs.weight")
        if self.key.get("rope.scaling.type") == "linear":
            frequencies = frequencies / self.key["rope.scaling.factor"]
        if self.architecture == "qwen35":
            sections = self.key["rope.dimension_sections"]
            # Sections by turns; pairs beyond them take the fourth position, which is 0 for text.
            frequencies = np.where(np.arange(count) < 3 * np.array(sections)[np.arange(count) % 3], frequencies, 0.0)
            assert sum(sections) == count
        angles = np.arange(len(x))[:, None, None] * frequencies
        turned = x.copy()
        if self.architecture in NEIGHBOURS:
            first, second = slice(0, 2 * count, 2), slice(1, 2 * count, 2)
        else:
            first, second = slice(0, count), slice(count, 2 * count)
        turned[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
        turned[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
        return turned

    def mamba2(self, x: np.ndarray, place: str) -> np.ndarray:
        inner, heads = self.key["ssm.inner_size"], self.key["ssm.time_step_rank"]
        groups, size = self.key["ssm.group_count"], self.key["ssm.state_size"]
        gate, mixed, step = np.split(self.linear(x, f"{place}.ssm_in"), [inner, 2 * inner + 2 * groups * size], axis=-1)
        mixed = silu(convolved(mixed, self.get(f"{place}.ssm_conv1d.weight")) + self.get(f"{place}.ssm_conv1d.bias"))
        values, write, read = np.split(mixed, [inner, inner + groups * size], axis=-1)
        values = values.reshape(len(x), heads, inner // heads)
        write, read = (np.repeat(part.reshape(len(x), groups, size), heads // groups, axis=1) for part in (write, read))
        step = softplus(step + self.get(f"{place}.ssm_dt.bias"))
        decay = np.exp(step * self.get(f"{place}.ssm_a")[:, 0])
        state, outputs = np.zeros((heads, inner // heads, size)), []
        for at in range(len(x)):
            state = state * decay[at][:, None, None] + np.einsum("h,hp,hn->hpn", step[at], values[at], write[at])
            outputs.append(np.einsum("hpn,hn->hp", state, read[at]) + self.get(f"{place}.ssm_d") * values[at])
        output = np.stack(outputs).reshape(len(x), inner) * silu(gate)
        normed = rms_norm(output.reshape(len(x), groups, -1), self.eps) * self.get(f"{place}.ssm_norm.weight")
        return self.linear(normed.reshape(len(x), inner), f"{place}.ssm_out")

    def gated_delta(self, x: np.ndarray, place: str) -> np.ndarray:
        keys, heads = self.key["ssm.group_count"], self.key["ssm.time_step_rank"]
        size = self.key["ssm.state_size"]
        mixed = silu(convolved(self.linear(x, f"{place}.attn_qkv"), self.get(f"{place}.ssm_conv1d.weight")))
        query, key, value = np.split(mixed, [keys * size, 2 * keys * size], axis=-1)
        query, key, value = (part.reshape(len(x), -1, size) for part in (query, key, value))
        # ggml_l2_norm, then ggml_repeat: whole copies one after the other.
        query, key = (part / np.maximum(np.sqrt((part**2).sum(-1, keepdims=True)), self.eps) for part in (query, key))
        query, key = (np.tile(part, (1, heads // keys, 1)) for part in (query, key))
        beta = sigmoid(self.linear(x, f"{place}.ssm_beta"))
        step = softplus(x @ self.get(f"{place}.ssm_alpha.weight").T + self.get(f"{place}.ssm_dt.bias"))
        decay = np.exp(step * self.get(f"{place}.ssm_a"))
        state, outputs = np.zeros((heads, size, size)), []
        for at in range(len(x)):
            state = state * decay[at][:, None, None]
            missing = (value[at] - np.einsum("hkv,hk->hv", state, key[at])) * beta[at][:, None]
            state = state + np.einsum("hk,hv->hkv", key[at], missing)
            outputs.append(np.einsum("hkv,hk->hv", state, query[at]) * size**-0.5)
        gate = self.linear(x, f"{place}.attn_gate").reshape(len(x), heads, size)
        normed = rms_norm(np.stack(outputs), self.eps) * self.get(f"{place}.ssm_norm.weight") * silu(gate)
        return self.linear(normed.reshape(len(x), -1), f"{place}.ssm_out")
