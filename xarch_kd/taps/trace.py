"""Forward pass that returns the features at the requested taps and keeps nothing else alive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.display import as_html, as_text, ranges
from xarch_kd.errors import UsageError
from xarch_kd.mixing.base import Mixing
from xarch_kd.taps.layout import Layout, layout_of, run_base
from xarch_kd.taps.recording import Feature, recording
from xarch_kd.taps.sites import WHOLE_TAPS, Site, TapSelection, refuse_unreadable, sites_of


class Trace:
    """Result of one forward pass at the requested taps.

    `trace["hidden"][3]` is [batch, time, dim]; `trace["embedding"]` and `trace["head_input"]` are tensors themselves;
    `trace["mixing"][3]` is a `xarch_kd.mixing.base.Mixing`, the mixer's token-mixing matrix stored as factors, and
    `trace["values"][3]` are its values, [batch, time, heads, dim]. Attention with grouped heads has values per key
    head: head h of the matrix applies to key head h // (heads / key heads). If each channel has its own matrix (Mamba,
    short convolutions, RG-LRU) a head is a channel of dimension 1.
    `embedding` is the residual stream that enters the first block (position embeddings and multipliers included),
    `hidden` the one that leaves a block, `mixer_input` the mixer's input, `mixer_output` and `mlp_output` their outputs
    as added to the residual stream (a norm after them and a residual multiplier included), `head_input` the
    final-normed hidden state.

    >>> import torch
    >>> import xarch_kd as xkd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> trace = xkd.trace(model, torch.arange(6)[None], taps=["embedding", "hidden"])
    >>> list(trace), sorted(trace["hidden"])
    (['embedding', 'hidden'], [0, 1])
    """

    def __init__(self, values: Mapping[Site, Feature]) -> None:
        self._values = dict(values)

    @overload
    def __getitem__(
        self, tap: Literal["hidden", "mixer_input", "mixer_output", "mlp_output", "values"]
    ) -> dict[int, Tensor]: ...
    @overload
    def __getitem__(self, tap: Literal["mixing"]) -> dict[int, Mixing]: ...
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

    @overload
    def at(self, tap: Literal["mixing"], layer: int) -> Mixing: ...
    @overload
    def at(self, tap: str, layer: int | None = None) -> Any: ...
    def at(self, tap: str, layer: int | None = None) -> Any:
        """Return the features of one site, mostly [batch, time, dim]; `layer` is None for `embedding`, `head_input`."""
        if Site(tap, layer) not in self._values:
            raise UsageError(
                "This site was not traced.",
                asked=f"{tap}, layer {layer}",
                found=", ".join(f"{t} {n}" for t, n in self._values),
            )
        return self._values[Site(tap, layer)]

    def __repr__(self) -> str:
        return as_text(self, more="iterate over the trace for its taps")

    def __rich__(self) -> Table:
        table = Table(title="Trace", title_justify="left", box=None, pad_edge=False, header_style="dim")
        for column in ("tap", "layers", "holds"):
            table.add_column(column, overflow="fold")
        for tap in self:
            sites = {site.layer: value for site, value in self._values.items() if site.tap == tap}
            held = list(dict.fromkeys(_description(value) for value in sites.values()))
            shown = "; ".join(held[:3]) + ("; …" if len(held) > 3 else "")
            table.add_row(tap, "" if tap in WHOLE_TAPS else ranges([layer or 0 for layer in sites]), Text(shown))
        return table

    def _repr_html_(self) -> str:
        return as_html(self)

    def __contains__(self, tap: object) -> bool:
        return any(site.tap == tap for site in self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(site.tap for site in self._values))


def _description(value: Feature) -> str:
    """Return kind, shape and dtype of the feature at a site."""
    if isinstance(value, Tensor):
        return f"{[*value.shape]} {str(value.dtype).removeprefix('torch.')}"
    return repr(value).splitlines()[0]


def trace(
    model: PreTrainedModel | Layout,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    taps: TapSelection,
    layers: Sequence[int] | None = None,
    paths: Mapping[str, str | None] | object | None = None,
    position_ids: Tensor | None = None,
) -> Trace:
    """Run the base model once on `input_ids` [batch, time] and return the features at `taps`.

    `taps` are names read at `layers` (None: every block), or a mapping of name → layers. The head never runs, and the
    pass stops as soon as all taps are recorded, unless `head_input` is requested. Gradients flow if they are enabled.
    Non-reentrant gradient checkpointing works; of compiled blocks the taps outside the block can be read. The
    valid range of a mixing follows from `attention_mask` [batch, time], and a mixing has no attention dropout.
    `position_ids` [batch, time] are those of rows that pack several documents.

    Raises UsageError for an unknown tap or a layer out of range, TapError for a tap that the model does not have,
    one that reentrant checkpointing or compilation would make silently wrong, and a mixing under a mask with holes.

    >>> import torch
    >>> import xarch_kd as xkd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> trace = xkd.trace(model, torch.arange(6)[None], taps=["hidden", "mixing"], layers=[1])
    >>> trace["hidden"][1].shape, trace["mixing"][1].dense().shape
    (torch.Size([1, 6, 32]), torch.Size([1, 4, 6, 6]))
    """
    layout = layout_of(model, paths)
    sites = sites_of(layout, taps, layers)
    if not sites:
        raise UsageError("No site was requested: taps or layers are empty.", fix='e.g. taps=["hidden"]')
    refuse_unreadable(layout, sites)
    head_site = Site("head_input", None)
    with recording(layout, sites, attention_mask=attention_mask, stops=head_site not in sites) as values:
        head_input = run_base(layout, input_ids, attention_mask, position_ids)
        if head_site in sites:
            values[head_site] = head_input
        del head_input
    return Trace({site: values[site] for site in sites})
