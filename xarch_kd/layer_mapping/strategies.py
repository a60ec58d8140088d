"""Registry of layer-map strategies, and the function that builds a map from a strategy's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from xarch_kd.errors import UsageError, suggest
from xarch_kd.layer_mapping.counts import (
    all_to_one,
    block_average,
    every,
    first,
    last,
    random,
    replaced,
    reverse,
    same,
    uniform,
    uniform_begin,
    uniform_endpoints,
)
from xarch_kd.layer_mapping.kinds import type_aware
from xarch_kd.layer_mapping.layer_map import LayerMap
from xarch_kd.layer_mapping.learned import LearnedMap
from xarch_kd.layer_mapping.similarity import cka, monotone
from xarch_kd.layer_mapping.transport import optimal_transport

Needs = Literal["counts", "types", "similarity", "training"]


@dataclass(frozen=True)
class Strategy:
    """Function that builds a layer map, and its positional arguments; its options are keyword arguments.

    `counts`: the depths (student layers, teacher layers); `types`: the kinds of both models' mixers; `similarity`: a
    matrix [student layers, teacher layers] from a calibration pass; `training`: the depths, for a trained module.

    >>> from xarch_kd.layer_mapping import STRATEGIES
    >>> STRATEGIES["uniform"].needs
    'counts'
    """

    function: Callable[..., LayerMap | LearnedMap]
    needs: Needs

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


STRATEGIES: Final[dict[str, Strategy]] = {
    "same": Strategy(same, "counts"),
    "replaced": Strategy(replaced, "counts"),
    "uniform": Strategy(uniform, "counts"),
    "uniform_endpoints": Strategy(uniform_endpoints, "counts"),
    "uniform_begin": Strategy(uniform_begin, "counts"),
    "first": Strategy(first, "counts"),
    "last": Strategy(last, "counts"),
    "every": Strategy(every, "counts"),
    "block_average": Strategy(block_average, "counts"),
    "reverse": Strategy(reverse, "counts"),
    "all_to_one": Strategy(all_to_one, "counts"),
    "random": Strategy(random, "counts"),
    "type_aware": Strategy(type_aware, "types"),
    "cka": Strategy(cka, "similarity"),
    "monotone": Strategy(monotone, "similarity"),
    "optimal_transport": Strategy(optimal_transport, "similarity"),
    "learned": Strategy(LearnedMap, "training"),
}


def strategy_named(name: str) -> Strategy:
    """Return the strategy. Raises UsageError for an unknown name.

    >>> from xarch_kd.layer_mapping import strategy_named
    >>> strategy_named("uniform").function(2, 4).pairs()
    ((0, 1, 1.0), (1, 3, 1.0))
    """
    if name not in STRATEGIES:
        raise UsageError(
            f"layers: unknown strategy.{suggest(name, STRATEGIES)}", asked=name, allowed=" | ".join(STRATEGIES)
        )
    return STRATEGIES[name]


def build_layer_map(
    name: str,
    student_layers: int,
    teacher_layers: int,
    *,
    replaced_layers: Sequence[int] = (),
    student_kinds: Sequence[str] | None = None,
    teacher_kinds: Sequence[str] | None = None,
    similarity: Tensor | None = None,
    options: Mapping[str, object] | None = None,
) -> LayerMap:
    """Return the layer map of a strategy, which takes what it needs of what is known; `options` are its own.

    Of `learned` this is the map that it starts with.

    Raises UsageError for an unknown name or option, an option that is missing, what is needed and not known, and what
    the strategy itself refuses.

    >>> from xarch_kd.layer_mapping import build_layer_map
    >>> build_layer_map("uniform", 2, 4).pairs()
    ((0, 1, 1.0), (1, 3, 1.0))
    """
    strategy = strategy_named(name)
    chosen = dict(options or {})
    if name == "replaced":
        chosen.setdefault("replaced_layers", replaced_layers)
    _check_options(name, strategy, chosen)
    depths = (student_layers, teacher_layers)
    if strategy.needs == "types":
        if student_kinds is None or teacher_kinds is None:
            raise UsageError(f"layers: {name} needs the kinds of the mixers of both models")
        made = strategy.function(student_kinds, teacher_kinds, **chosen)
    elif strategy.needs == "similarity":
        made = strategy.function(_measured(name, similarity, depths, chosen), **chosen)
    else:
        made = strategy.function(*depths, **chosen)
    return made.layer_map(0.0) if isinstance(made, LearnedMap) else made


def _check_options(name: str, strategy: Strategy, chosen: Mapping[str, object]) -> None:
    for option in chosen:
        if option not in strategy.options:
            raise UsageError(
                f"layers: {name} has no such option.{suggest(option, strategy.options)}",
                asked=option,
                allowed=", ".join(strategy.options) or "none",
            )
    parameters = inspect.signature(strategy.function).parameters
    missing = [
        option
        for option in strategy.options
        if parameters[option].default is inspect.Parameter.empty and option not in chosen
    ]
    if missing:
        raise UsageError(f"layers: {name} needs the option {missing[0]}", found="none given")


def _measured(
    name: str, similarity: Tensor | None, depths: tuple[int, int], chosen: Mapping[str, object]
) -> Tensor | None:
    """Return the similarity, or None where a cost takes its place."""
    matrix = chosen.get("cost")
    known = similarity if matrix is None else matrix
    if known is None:
        raise UsageError(
            f"layers: {name} needs a similarity of the layers, and none was measured",
            fix="run the calibration pass first, or use a strategy that the depths decide, e.g. layers: uniform",
        )
    if not isinstance(known, Tensor) or tuple(known.shape) != depths:
        raise UsageError(
            f"layers: the {'similarity' if matrix is None else 'cost'} that {name} reads does not fit",
            found=list(known.shape) if isinstance(known, Tensor) else type(known).__name__,
            allowed=f"{list(depths)} [student layers, teacher layers]",
        )
    return similarity if matrix is None else None
