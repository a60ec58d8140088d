"""Taps of softmax attention: queries, keys and values as passed to a model's attention function.

Models of transformers look up their attention function by a name in their config. While a mixer is tapped, it has a
copy of its config with another name, registered to a function that records its arguments and calls the original one.
The model's config, its masks and all other modules are unchanged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from xarch_kd.errors import TapError
from xarch_kd.mixing.softmax import SoftmaxMixing
from xarch_kd.ops import checks
from xarch_kd.taps.valid_range import valid_range_of

# Arguments that change the scores in a way that SoftmaxMixing cannot represent.
FOREIGN_ARGUMENTS = ("position_bias", "score_mod", "indices", "block_indices")


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Arguments of an attention call: query [batch, heads, time, dim], key [batch, key heads, time, dim].

    `value` [batch, key heads, time, value dim] is None unless requested. `mask` is the model's, in the form of its
    attention implementation; `implementation` is that implementation's name.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: object
    implementation: str | None
    arguments: Mapping[str, Any]
    value: Tensor | None = None

    def checked_value(self) -> Tensor:
        """Return the values [batch, key heads, time, value dim]. Raises TapError if a cache or prefix extends them."""
        assert self.value is not None
        if self.value.shape[2] != self.query.shape[2]:
            raise TapError(
                f"The values of {type(self.module).__name__} are not those of one pass.",
                asked="values",
                found="more values than queries: a cache or a prefix",
                allowed="queries and values of the same tokens",
            )
        return self.value

    def mixing(self, attention_mask: Tensor | None) -> SoftmaxMixing:
        """Return the mixing matrix; `attention_mask` [batch, time] is that of the pass.

        Raises TapError if the model's mask is not a combination of causality, one window and padding.
        """
        foreign = [name for name in FOREIGN_ARGUMENTS if self.arguments.get(name) is not None]
        if foreign or self.query.shape[2] != self.key.shape[2]:
            raise TapError(
                f"The scores of {type(self.module).__name__} are not those of one pass of plain attention.",
                asked="mixing",
                found=f"an argument {foreign[0]}" if foreign else "more keys than queries: a cache or a prefix",
                allowed="queries and keys of the same tokens, a softcap, sinks, a window",
            )
        scale = self.arguments.get("scaling")
        mixing = SoftmaxMixing(
            query=self.query.transpose(1, 2),
            key=self.key.transpose(1, 2),
            scale=self.query.shape[-1] ** -0.5 if scale is None else float(scale),
            causal=self._is_causal(),
            window=self._window(),
            softcap=self.arguments.get("softcap"),
            sinks=self.arguments.get("s_aux"),
            valid_range=valid_range_of(attention_mask, self.query.device),
        )
        self._check_mask(mixing)
        return mixing

    def _is_causal(self) -> bool:
        given = self.arguments.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    def _window(self) -> int | None:
        window = self.arguments.get("sliding_window", getattr(self.module, "sliding_window", None))
        # Flash attention applies the window itself; other implementations have it in the mask, if there is one.
        is_applied = self.mask is not None or "flash" in (self.implementation or "")
        return int(window) if window and is_applied and window < self.query.shape[2] else None

    def _check_mask(self, mixing: SoftmaxMixing) -> None:
        """Compare three rows per sequence of the score mask with the bounds of the mixing."""
        mask = self.mask
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            return
        visible = mask if mask.dtype == torch.bool else mask >= 0
        rows = _three_rows(mixing)
        position = torch.arange(mixing.time, device=mixing.device)
        expected = mixing.valid_mask()[:, None, :].expand(-1, rows.shape[1], -1)
        if mixing.causal:
            expected = expected & (position <= rows[..., None])
        if mixing.window is not None:
            expected = expected & (rows[..., None] - position < mixing.window)
        found = visible.expand(mixing.batch, -1, -1, -1).gather(
            2, rows[:, None, :, None].expand(-1, visible.shape[1], -1, visible.shape[3])
        )
        is_empty = ~mixing.valid_mask().any(1)
        name = type(self.module).__name__
        checks.require(
            ((found == expected[:, None]) | is_empty[:, None, None, None]).all(),
            lambda: TapError(
                f"{name} masks in a way that a softmax mixing does not hold.",
                asked="mixing",
                found="a mask with other entries than causality, the window and the padding give",
                allowed="causal attention, one sliding window, padding at the ends of a sequence",
                fix="give one sequence per row, without packing, chunks or a prefix that is seen from before it",
            ),
        )


def _three_rows(mixing: SoftmaxMixing) -> Tensor:
    """Return the first, middle and last valid row, [batch, 3]."""
    valid = mixing.valid_mask()
    number = valid.sum(1)
    first = valid.int().argmax(1)
    steps = torch.stack([torch.zeros_like(number), number // 2, (number - 1).clamp(min=0)], dim=1)
    return (first[:, None] + steps).clamp(max=mixing.time - 1)


def calls_attention_interface(mixer: nn.Module) -> bool:
    """Return True if the code of `mixer` looks up its attention function in a table where it can be replaced."""
    return bool(_callers(mixer))


@contextmanager
def intercepting(mixer: nn.Module, keep: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Pass every attention call of `mixer` to `keep` before the model's own function runs.

    Raises TapError for a mixer whose code does not look up its attention function.
    """
    callers = _callers(mixer)
    if not callers:
        raise never_called(mixer)
    with ExitStack() as stack:
        for module in callers:
            stack.enter_context(_intercepted(module, keep))
        yield


def never_called(mixer: nn.Module, tap: str = "mixing") -> TapError:
    """Return the error for a mixer that ran without calling its attention function."""
    return TapError(
        f"{type(mixer).__name__} does not call transformers' AttentionInterface, so its queries, keys and values "
        "cannot be read.",
        asked=tap,
        allowed="models whose attention function is looked up by `config._attn_implementation`",
        fix="read mixer_output instead",
    )


@contextmanager
def _intercepted(module: nn.Module, keep: Callable[[AttentionCall], None]) -> Iterator[None]:
    functions, eager = _namespace(module)
    config: Any = module.config
    implementation = config._attn_implementation
    # The name begins with the model's own, since some mixers look for `flash` in it; it has no digit more, which
    # would be taken for a version, and nested readings of one module have different names.
    name = f"{implementation}+" + "".join(chr(ord("a") + int(digit)) for digit in str(id(module)))

    def attention(
        caller: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object = None, *args: Any, **kwargs: Any
    ) -> object:
        keep(
            AttentionCall(
                module=caller,
                query=query,
                key=key,
                value=value,
                mask=mask,
                implementation=implementation,
                arguments=kwargs,
            )
        )
        own = functions.get_interface(implementation, eager)
        return own(caller, query, key, value, mask, *args, **kwargs)

    functions[name] = attention
    module.config = _renamed(config, name)  # type: ignore[assignment]  # a plain attribute
    try:
        yield
    finally:
        module.config = config
        del functions[name]


def _renamed(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    renamed = copy.copy(config)
    # Not through the property, which would also rename the sub-configs, and those are shared.
    renamed._attn_implementation_internal = name
    return renamed


def _callers(mixer: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in mixer.modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
        and isinstance(_namespace(module)[0], MutableMapping)
    ]


def _namespace(module: nn.Module) -> tuple[Any, Any]:
    """Return the table of attention functions, and the eager one, in the namespace of `module`'s code."""
    names = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return names.get("ALL_ATTENTION_FUNCTIONS"), names.get("eager_attention_forward")
