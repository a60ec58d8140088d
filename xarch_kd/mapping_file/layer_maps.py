"""Layer maps of a mapping file: the teacher blocks that each student block learns from."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field

from xarch_kd.mapping_file.scalars import ConfigModel, Fraction, LayerIndex, Name, NonNegative, Positive


class LayerPair(ConfigModel):
    """Student block `student` learns from teacher block `teacher` (both count from 0).

    `weight` is relative to the other pairs of the same student block.
    """

    student: LayerIndex
    teacher: LayerIndex
    weight: Positive = 1.0


class EveryStrategy(ConfigModel):
    """Student block i learns from teacher block (i+1)·k - 1."""

    strategy: Literal["every"]
    k: Annotated[int, Field(ge=1)]


class AllToOneStrategy(ConfigModel):
    """Every student block learns from one teacher block, by default the last: a control."""

    strategy: Literal["all_to_one"]
    teacher_layer: LayerIndex | None = None


class RandomStrategy(ConfigModel):
    """A random teacher block for each student block, in order if `ordered`, redrawn every `redraw` steps: a control."""

    strategy: Literal["random"]
    seed: Annotated[int, Field(ge=0)] = 0
    ordered: bool = False
    redraw: Annotated[int, Field(ge=1)] | None = None


class MonotoneStrategy(ConfigModel):
    """The order-preserving map of greatest total similarity (by dynamic programming).

    `strict`: no teacher block twice; `band`: the largest distance from the uniform map, in teacher blocks.
    """

    strategy: Literal["monotone"]
    strict: bool = True
    band: Annotated[int, Field(ge=0)] | None = None
    last_to_last: bool = True


class TransportStrategy(ConfigModel):
    """The cheapest transport of the student's blocks to the teacher's, at cost 1 - similarity.

    `entropy` is relative to the median cost (0: exact, by linear programming); `order` adds order · (i/S - j/T)².
    """

    strategy: Literal["optimal_transport"]
    entropy: NonNegative = 0.0
    order: NonNegative = 0.0


class LearnedStrategy(ConfigModel):
    """Attention over the teacher's blocks, trained with the student: a softmax(logits / temperature) per student block.

    With `final_temperature` the temperature is annealed to it over the stage, near one-hot at 0.1. The entropy of the
    teacher blocks in use is kept above `usage_floor` of its maximum, so that the map does not collapse onto one block.
    """

    strategy: Literal["learned"]
    temperature: Positive = 1.0
    final_temperature: Positive | None = None
    usage_floor: Fraction = 0.5


class CustomStrategy(ConfigModel):
    """Layer map passed from Python as `layer_maps={name: …}`."""

    strategy: Literal["custom"]
    name: Name


PlainName = Literal[
    "same",
    "replaced",
    "uniform",
    "uniform_endpoints",
    "uniform_begin",
    "first",
    "last",
    "block_average",
    "type_aware",
    "cka",
    "reverse",
]


class PlainStrategy(ConfigModel):
    """Strategy without options; its name alone is equivalent."""

    strategy: PlainName


# Those whose options all have a default.
StrategyName = Literal[PlainName, "monotone", "optimal_transport", "all_to_one", "random", "learned"]
LayerStrategy = Annotated[
    PlainStrategy
    | EveryStrategy
    | AllToOneStrategy
    | RandomStrategy
    | MonotoneStrategy
    | TransportStrategy
    | LearnedStrategy
    | CustomStrategy,
    Field(discriminator="strategy"),
]
STRATEGY_OPTIONS: Final[tuple[type[ConfigModel], ...]] = get_args(get_args(LayerStrategy)[0])
