"""Mixings of every family and option, and their entries by formulas and recurrences, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from xarch_kd.mixing import (
    BandedMixing,
    DeltaMixing,
    LinearMixing,
    Mixing,
    SelectiveMixing,
    SoftmaxMixing,
    SSDMixing,
)

BATCH, HEADS, WIDTH, STATE = 2, 4, 8, 4
# Odd, more than one chunk of 64, no multiple of 16.
TIME = 83
BOUNDS = {
    "whole": None,
    "right": [[0, 50], [0, 83]],
    "left": [[33, 83], [0, 83]],
    "both": [[2, 83], [20, 67]],
    "empty": [[0, 83], [40, 40]],
}


class Make:
    """Random factors of one seed, all leaves that require gradients, in one dtype."""

    def __init__(self, dtype: torch.dtype, batch: int, time: int, seed: int) -> None:
        self.dtype, self.batch, self.time = dtype, batch, time
        self.generator = torch.Generator().manual_seed(seed)

    def leaf(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).requires_grad_()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def token(self, *shape: int) -> Tensor:
        return self.leaf(self.normal(self.batch, self.time, *shape))

    def positive(self, *shape: int) -> Tensor:
        return self.leaf(self.normal(self.batch, self.time, *shape).exp() / 4)

    def decay(self, *shape: int) -> Tensor:
        return self.leaf(-self.normal(self.batch, self.time, *shape).exp() / 4)

    def unit(self, *shape: int) -> Tensor:
        return self.leaf(normalize(self.normal(self.batch, self.time, *shape), dim=-1))

    def share(self, *shape: int) -> Tensor:
        return self.leaf(self.normal(self.batch, self.time, *shape).sigmoid())

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(self.batch, self.time, *shape, dtype=self.dtype)


Build = Callable[..., Mixing]


def softmax(make: Make, key_heads: int = HEADS, sinks: bool = False, **options: Any) -> Mixing:
    query, key = make.token(HEADS, WIDTH), make.token(key_heads, WIDTH)
    logits = make.leaf(make.normal(HEADS)) if sinks else None
    return SoftmaxMixing(query=query, key=key, sinks=logits, **{"scale": 0.4, **options})


def ssd(make: Make, groups: int = 1, state: int = 24, skip: bool = True, **options: Any) -> Mixing:
    return SSDMixing(
        C=make.token(groups, state),
        B=make.token(groups, state),
        log_decay=make.decay(HEADS),
        dt=make.positive(HEADS),
        D=make.leaf(make.normal(HEADS)) if skip else None,
        **options,
    )


def recurrent_unit(make: Make, **options: Any) -> Mixing:
    one = make.ones(1, 1)
    return SSDMixing(C=one, B=one, log_decay=make.decay(HEADS), dt=make.positive(HEADS), **options)


def selective(make: Make, groups: int = 0, skip: bool = True, **options: Any) -> Mixing:
    shape = (groups, STATE) if groups else (STATE,)
    return SelectiveMixing(
        C=make.token(*shape),
        B=make.token(*shape),
        dt=make.positive(HEADS),
        A=make.leaf(-make.normal(HEADS, STATE).exp()),
        D=make.leaf(make.normal(HEADS)) if skip else None,
        **options,
    )


def decay_of(make: Make, kind: str) -> Tensor | None:
    shapes = {"head": (HEADS,), "channel": (HEADS, WIDTH)}
    return make.decay(*shapes[kind]) if kind in shapes else None


def linear(make: Make, decay: str = "none", key_heads: int = HEADS, normalized: bool = False, **options: Any) -> Mixing:
    # Feature maps of normalized linear attention are positive: its rows have a sum to divide by.
    features = make.positive if normalized else make.token
    return LinearMixing(
        query=features(HEADS, WIDTH),
        key=features(key_heads, WIDTH),
        log_decay=decay_of(make, decay),
        normalized=normalized,
        **{"scale": 0.7, **options},
    )


def delta(make: Make, decay: str = "none", **options: Any) -> Mixing:
    query, key, beta = make.token(HEADS, WIDTH), make.unit(HEADS, WIDTH), make.share(HEADS)
    return DeltaMixing(query=query, key=key, beta=beta, log_decay=decay_of(make, decay), **{"scale": 0.6, **options})


def banded(make: Make, rows: bool = True, columns: bool = True, **options: Any) -> Mixing:
    return BandedMixing(
        taps=make.leaf(make.normal(HEADS, 3)),
        row_scale=make.token(HEADS) if rows else None,
        column_scale=make.token(HEADS) if columns else None,
        **options,
    )


CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "softmax": (softmax, {}),
    "softmax-grouped": (softmax, {"key_heads": 2}),
    "softmax-one-key-head": (softmax, {"key_heads": 1, "softcap": 2.0}),
    "softmax-bidirectional": (softmax, {"causal": False}),
    "softmax-window": (softmax, {"window": 7, "key_heads": 2}),
    "softmax-window-of-one": (softmax, {"window": 1}),
    "softmax-window-beyond": (softmax, {"window": 500}),
    "softmax-bidirectional-window": (softmax, {"causal": False, "window": 5}),
    "softmax-capped": (softmax, {"softcap": 1.5}),
    "softmax-sinks": (softmax, {"sinks": True, "key_heads": 2}),
    "softmax-all": (softmax, {"sinks": True, "softcap": 2.0, "window": 20, "key_heads": 2}),
    "ssd": (ssd, {}),
    "ssd-groups": (ssd, {"groups": 2}),
    "ssd-heads": (ssd, {"groups": 4, "skip": False}),
    "ssd-small-state": (ssd, {"state": 2, "groups": 2}),
    "recurrent-unit": (recurrent_unit, {}),
    "selective": (selective, {}),
    "selective-groups": (selective, {"groups": 2, "skip": False}),
    "linear": (linear, {"key_heads": 2}),
    "linear-normalized": (linear, {"normalized": True}),
    "linear-head-decay": (linear, {"decay": "head", "key_heads": 2}),
    "linear-head-decay-normalized": (linear, {"decay": "head", "normalized": True, "key_heads": 1}),
    "linear-channel-decay": (linear, {"decay": "channel", "key_heads": 2}),
    "linear-channel-decay-normalized": (linear, {"decay": "channel", "normalized": True}),
    "delta": (delta, {}),
    "delta-head-decay": (delta, {"decay": "head"}),
    "delta-channel-decay": (delta, {"decay": "channel"}),
    "banded": (banded, {}),
    "banded-rows": (banded, {"columns": False}),
    "banded-columns": (banded, {"rows": False}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """The name of a family with one choice of its options."""
    return request.param


@pytest.fixture
def build() -> Callable[..., Mixing]:
    """Return a function that builds a case."""

    def made(
        case: str,
        *,
        bounds: str = "whole",
        dtype: torch.dtype = torch.float64,
        batch: int = BATCH,
        time: int = TIME,
        seed: int = 0,
    ) -> Mixing:
        function, options = CASES[case]
        given = BOUNDS[bounds]
        valid_range = None if given is None else torch.tensor(given)
        return function(Make(dtype, batch, time, seed), **options, valid_range=valid_range)

    return made


def weighed(mixing: SoftmaxMixing, query: Tensor, key: Tensor) -> Tensor:
    """Softmax of each row over the tokens that it may see, by its definition."""
    time = query.shape[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("ihd,jhd->hij", query, key) * mixing.scale
    if mixing.softcap is not None:
        logits = mixing.softcap * torch.tanh(logits / mixing.softcap)
    seen = torch.ones(time, time, dtype=torch.bool)
    if mixing.causal:
        seen = seen.tril()
    if mixing.window is not None:
        seen = seen.triu(1 - mixing.window)
    logits = logits.masked_fill(~seen, float("-inf"))
    if mixing.sinks is not None:
        sink = mixing.sinks[:, None, None].expand(-1, time, 1)
        return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
    return torch.softmax(logits, -1)


def recurrent(read: Tensor, write: Tensor, kept: Tensor, identity: Tensor) -> Tensor:
    """y_t = read_t·S_t, S_t = kept_t S_{t−1} + write_t v_tᵀ for the columns of the identity as values: [heads, t, t].

    read, write and kept are [time, heads, state].
    """
    state = torch.zeros(*read.shape[1:], len(identity), dtype=read.dtype)
    rows = []
    for now in range(len(identity)):
        state = kept[now, :, :, None] * state + write[now, :, :, None] * identity[now]
        rows.append((read[now, :, :, None] * state).sum(1))
    return torch.stack(rows, 1)


def corrected(query: Tensor, key: Tensor, beta: Tensor, kept: Tensor, identity: Tensor) -> Tensor:
    """The delta rule on the columns of the identity: the state forgets, then what it holds for the key is corrected."""
    state = torch.zeros(*key.shape[1:], len(identity), dtype=key.dtype)
    rows = []
    for now in range(len(identity)):
        state = kept[now, :, :, None] * state
        held = (key[now, :, :, None] * state).sum(1)
        state = state + key[now, :, :, None] * (beta[now, :, None] * (identity[now] - held))[:, None]
        rows.append((query[now, :, :, None] * state).sum(1))
    return torch.stack(rows, 1)


def convolved(mixing: BandedMixing, part: dict[str, Tensor], time: int, dtype: torch.dtype) -> Tensor:
    """Entries on the diagonal and the few below it."""
    entries = torch.zeros(mixing.heads, time, time, dtype=dtype)
    for back in range(min(mixing.taps.shape[1], time)):
        entries = entries + torch.diag_embed(mixing.taps[:, back, None].expand(-1, time - back), -back)
    for name, axis in (("row_scale", -1), ("column_scale", -2)):
        if name in part:
            entries = entries * part[name].T.unsqueeze(axis)
    return entries


def spread(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def kept(log_decay: Tensor | None, like: Tensor) -> Tensor:
    if log_decay is None:
        return torch.ones_like(like)
    return (log_decay if log_decay.dim() == 3 else log_decay[..., None]).exp().expand_as(like)


def entries_of(mixing: Mixing, part: dict[str, Tensor], time: int) -> Tensor:
    """Entries [heads, time, time] of one sequence whose tokens all count; `part` holds its factors."""
    dtype = next(iter(part.values())).dtype
    identity = torch.eye(time, dtype=dtype)
    if isinstance(mixing, SoftmaxMixing):
        return weighed(mixing, part["query"], part["key"])
    if isinstance(mixing, BandedMixing):
        return convolved(mixing, part, time, dtype)
    if isinstance(mixing, DeltaMixing):
        query, key = part["query"], part["key"]
        decays = kept(part.get("log_decay"), key)
        return mixing.scale * corrected(query, key, part["beta"], decays, identity)
    if isinstance(mixing, LinearMixing):
        query, key = part["query"], spread(part["key"], mixing.heads)
        entries = mixing.scale * recurrent(query, key, kept(part.get("log_decay"), query), identity)
        return entries / entries.sum(-1, keepdim=True) if mixing.normalized else entries
    assert isinstance(mixing, SSDMixing | SelectiveMixing)
    read, write, dt = part["C"], part["B"], part["dt"][..., None]
    read, write = (spread(side if side.dim() == 3 else side[:, None], mixing.heads) for side in (read, write))
    if isinstance(mixing, SSDMixing):
        decays = part["log_decay"].exp()[..., None].expand_as(read)
    else:
        decays = (dt * mixing.A).exp()
    entries = recurrent(read, write * dt, decays, identity)
    return entries if mixing.D is None else entries + mixing.D[:, None, None] * identity


def dense_formula(mixing: Mixing) -> Tensor:
    """Entries [batch, heads, time, time]: of the counted tokens of each sequence alone, zeros around them."""
    whole = []
    shared = ("sinks", "A", "D", "taps")
    for index in range(mixing.batch):
        first, last = (0, mixing.time) if mixing.valid_range is None else mixing.valid_range[index].tolist()
        around = (first, mixing.time - last, first, mixing.time - last)
        part = {name: factor[index, first:last] for name, factor in mixing.factors.items() if name not in shared}
        if first == last:
            dtype = next(iter(part.values())).dtype
            whole.append(torch.zeros(mixing.heads, mixing.time, mixing.time, dtype=dtype))
        else:
            whole.append(torch.nn.functional.pad(entries_of(mixing, part, last - first), around))
    return torch.stack(whole)


@pytest.fixture
def formula() -> Callable[[Mixing], Tensor]:
    """Return a function that computes all entries of a mixing by the definition of its family."""
    return dense_formula
