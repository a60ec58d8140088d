"""One forward pass that yields what was asked for at the taps, and keeps nothing else alive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import UsageError
from xarch_kd.taps.layout import Layout, layout_of
from xarch_kd.taps.sites import WHOLE_TAPS, Site, recording, refuse_unreadable, sites_of


class Trace:
    """What one forward pass yielded.

    `trace["hidden"][3]` is [batch, time, width]; `trace["embedding"]` and `trace["head_input"]` are tensors themselves.
    `embedding` is the residual stream that enters the first block (position embeddings and multipliers included),
    `hidden` the one that leaves a block, `mixer_input` what the mixer is called with, `mixer_output` and `mlp_output`
    what they add to the residual stream (a norm after them and a residual multiplier included), `head_input` the
    final-normed hidden state.
    """

    def __init__(self, values: Mapping[Site, Tensor]) -> None:
        self._values = dict(values)

    @overload
    def __getitem__(self, tap: Literal["hidden", "mixer_input", "mixer_output", "mlp_output"]) -> dict[int, Tensor]: ...
    @overload
    def __getitem__(self, tap: Literal["embedding", "head_input"]) -> Tensor: ...
    @overload
    def __getitem__(self, tap: str) -> Any: ...
    def __getitem__(self, tap: str) -> Any:
        if tap not in self:
            raise UsageError("This tap was not traced.", asked=tap, found=", ".join(self))
        if tap in WHOLE_TAPS:
            return self._values[Site(tap, None)]
        return {site.layer: value for site, value in self._values.items() if site.tap == tap}

    def at(self, tap: str, layer: int | None = None) -> Tensor:
        """The tensor [batch, time, width] at one site; `layer` is None for `embedding` and `head_input`."""
        if Site(tap, layer) not in self._values:
            raise UsageError(
                "This site was not traced.",
                asked=f"{tap}, layer {layer}",
                found=", ".join(f"{t} {n}" for t, n in self._values),
            )
        return self._values[Site(tap, layer)]

    def __contains__(self, tap: object) -> bool:
        return any(site.tap == tap for site in self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(site.tap for site in self._values))


def trace(
    model: PreTrainedModel | Layout,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    taps: Sequence[str] | Mapping[str, Sequence[int] | None],
    layers: Sequence[int] | None = None,
    paths: Mapping[str, str | None] | object | None = None,
) -> Trace:
    """Run the base model once on `input_ids` [batch, time] and return the tensors at `taps`.

    `taps` are names read at `layers` (None: every block), or a mapping of name → layers. The head never runs, and the
    pass stops after the last block that is read, unless `head_input` is asked for. Gradients flow if they are enabled.
    Non-reentrant gradient checkpointing works; of compiled blocks the taps outside the block can be read.

    Raises UsageError for an unknown tap or a layer out of range, TapError for a tap that the model lacks or that
    reentrant checkpointing or compilation would make silently wrong.
    """
    layout = layout_of(model, paths)
    sites = sites_of(layout, taps, layers)
    if not sites:
        raise UsageError("Nothing was asked for: taps or layers are empty.", fix='e.g. taps=["hidden"]')
    refuse_unreadable(layout, sites)
    head_site = Site("head_input", None)
    last = max((site.layer for site in sites if site.layer is not None), default=None)
    stop_after = layout.blocks[last] if last is not None and head_site not in sites else None
    with recording(layout, sites, stop_after=stop_after) as values:
        output = layout.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        if head_site in sites:
            values[head_site] = output[0]
        del output
    return Trace({site: values[site] for site in sites})
