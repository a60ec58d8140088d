"""The objectives of a mapping file: what is matched, between which layers, through what, by which loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from xarch_kd.mapping_file.parts import BelowOne, Fraction, LayerIndex, Name, NonNegative, Number, Part, Positive

Tap = Literal["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output", "mixing", "head_input"]


class MeanSquaredError(Part):
    """Mean over the width of the squared difference."""

    kind: Literal["mse"]
    weight: Positive = 1.0


class RelativeMeanSquaredError(Part):
    """Squared difference over squared teacher norm, both summed over all unmasked tokens of the batch."""

    kind: Literal["relative_mse"]
    weight: Positive = 1.0


class Cosine(Part):
    """One minus the cosine of the angle, per token."""

    kind: Literal["cosine"]
    weight: Positive = 1.0


class NormalisedMeanSquaredError(Part):
    """Squared difference over squared teacher norm, per token."""

    kind: Literal["normalised_mse"]
    weight: Positive = 1.0
    epsilon: Positive = 1e-6


class Huber(Part):
    """Mean over the width of Huber's function of the difference: quadratic up to `delta`, linear beyond."""

    kind: Literal["huber"]
    weight: Positive = 1.0
    delta: Positive = 1.0


class EuclideanDistance(Part):
    """The length of the difference, per token: its gradient has the same size however near the student is."""

    kind: Literal["l2"]
    weight: Positive = 1.0


class MixingMatch(Part):
    """Distance of the rows of two token-mixing matrices, mean over rows and student heads; for the tap `mixing` alone.

    `heads` says what a student head learns from: `auto` is its own teacher head where the counts are equal, else `mean`
    (of a group of teacher heads) or `repeat` (a teacher head teaches a group), or non-negative weights [student heads,
    teacher heads] whose rows sum to 1. `probes` are those of `implementation: sketch`.
    """

    kind: Literal["mixing"]
    distance: Literal["cosine", "frobenius", "relative_frobenius", "kl", "cross_entropy"] = "cosine"
    heads: Literal["auto", "mean", "repeat"] | tuple[tuple[NonNegative, ...], ...] = "auto"
    implementation: Literal["auto", "fused", "streaming", "panels", "sketch", "reference"] = "auto"
    probes: Annotated[int, Field(ge=2)] = 64
    weight: Positive = 1.0


AlignLoss = Annotated[
    MeanSquaredError
    | RelativeMeanSquaredError
    | Cosine
    | NormalisedMeanSquaredError
    | Huber
    | EuclideanDistance
    | MixingMatch,
    Field(discriminator="kind"),
]


def _default_loss(validated: dict[str, object]) -> NormalisedMeanSquaredError | MixingMatch:
    if validated.get("tap") == "mixing":
        return MixingMatch(kind="mixing")
    return NormalisedMeanSquaredError(kind="normalised_mse")


class LayerPair(Part):
    """Student block `student` learns from teacher block `teacher` (both count from 0).

    `weight` is relative to the other pairs of the same student block.
    """

    student: LayerIndex
    teacher: LayerIndex
    weight: Positive = 1.0


class EveryStrategy(Part):
    """Student block i learns from teacher block (i+1)·k - 1."""

    strategy: Literal["every"]
    k: Annotated[int, Field(ge=1)]


class AllToOneStrategy(Part):
    """Every student block learns from one teacher block, by default the last: a control."""

    strategy: Literal["all_to_one"]
    teacher_layer: LayerIndex | None = None


class RandomStrategy(Part):
    """A random teacher block for each student block, in order if `ordered`: a control."""

    strategy: Literal["random"]
    seed: Annotated[int, Field(ge=0)] = 0
    ordered: bool = False


class MonotoneStrategy(Part):
    """The order-preserving map of greatest total similarity (by a dynamic programme).

    `strict`: no teacher block twice; `band`: at most so far from the uniform map, in teacher blocks.
    """

    strategy: Literal["monotone"]
    strict: bool = True
    band: Annotated[int, Field(ge=0)] | None = None
    last_to_last: bool = True


class TransportStrategy(Part):
    """The cheapest transport of the student's blocks to the teacher's, at cost 1 - similarity.

    `entropy` is relative to the median cost (0: exact, by a linear programme); `order` adds order · (i/S - j/T)².
    """

    strategy: Literal["optimal_transport"]
    entropy: NonNegative = 0.0
    order: NonNegative = 0.0


class PlainStrategy(Part):
    """A strategy without an option; its name alone says the same."""

    strategy: Literal[
        "same",
        "replaced",
        "uniform",
        "uniform_endpoints",
        "uniform_begin",
        "first",
        "last",
        "block_average",
        "reverse",
        "type_aware",
        "cka",
    ]


StrategyName = Literal[
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
    "monotone",
    "optimal_transport",
    "reverse",
    "all_to_one",
    "random",
]
LayerStrategy = Annotated[
    PlainStrategy | EveryStrategy | AllToOneStrategy | RandomStrategy | MonotoneStrategy | TransportStrategy,
    Field(discriminator="strategy"),
]


class MatrixProjector(Part):
    """One matrix; `orthogonal` keeps lengths and angles."""

    kind: Literal["linear", "orthogonal"]
    bias: bool = False


class LowRankProjector(Part):
    """The product of two thin matrices; `rank` is a quarter of the smaller width unless given."""

    kind: Literal["low_rank"]
    rank: Annotated[int, Field(ge=1)] | None = None
    bias: bool = False


class HiddenLayerProjector(Part):
    """One hidden layer of `width` units, twice the smaller width unless given."""

    kind: Literal["mlp"]
    width: Annotated[int, Field(ge=2)] | None = None
    bias: bool = False


ProjectorName = Literal["auto", "none", "linear", "low_rank", "mlp", "orthogonal"]
ProjectorWithOptions = Annotated[MatrixProjector | LowRankProjector | HiddenLayerProjector, Field(discriminator="kind")]


class Align(Part):
    """A tap of student blocks matched to the same tap of teacher blocks.

    `layers`: a strategy (`same` is block i to block i, `replaced` the same for blocks whose mixer was replaced,
    `uniform` end-aligned; `cka`, `monotone` and `optimal_transport` follow from a calibration pass), or explicit pairs.
    `embedding` and `head_input` have no layers. `mixing` has a loss of its own, which
    is its default (of the others it is `normalised_mse`), and no projector.
    """

    name: Name
    tap: Tap
    layers: StrategyName | LayerStrategy | tuple[LayerPair, ...] | None = None
    loss: Annotated[AlignLoss, Field(default_factory=_default_loss)]
    projector: ProjectorName | ProjectorWithOptions = "auto"

    @property
    def projector_kind(self) -> str:
        """The projector's kind, however it was written."""
        return self.projector if isinstance(self.projector, str) else self.projector.kind

    @property
    def projector_options(self) -> dict[str, Any]:
        """The projector's options, by the names that `build_projector` gives them."""
        if isinstance(self.projector, str):
            return {}
        return self.projector.model_dump(exclude={"kind"}, exclude_none=True)

    @model_validator(mode="after")
    def _loss_fits_the_tap(self) -> Align:
        if (self.tap == "mixing") != (self.loss.kind == "mixing"):
            raise ValueError(
                f"the loss '{self.loss.kind}' does not fit the tap '{self.tap}': mixing matrices are compared by "
                "loss: {kind: mixing}, and nothing else is"
            )
        if self.tap == "mixing" and self.projector_kind not in ("auto", "none"):
            raise ValueError("the tap 'mixing' takes no projector; unequal heads are bridged by loss: {heads: …}")
        return self


class PlainDivergence(Part):
    """A divergence without a parameter; its name alone says the same."""

    kind: Literal["forward_kl", "reverse_kl", "total_variation"]


class JensenShannon(Part):
    """β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q; `normalised` divides by β(1-β)."""

    kind: Literal["jsd"]
    beta: Fraction = 0.5
    normalised: bool = False


class SkewDivergence(Part):
    """KL(p ‖ α p + (1-α) q), or KL(q ‖ α q + (1-α) p)."""

    kind: Literal["skew_forward_kl", "skew_reverse_kl"]
    alpha: BelowOne = 0.1


class AlphaDivergence(Part):
    """(Σ p^α q^(1-α) - 1) / (α(α-1)): forward KL at α = 1, reverse KL at α = 0."""

    kind: Literal["alpha"]
    alpha: Number = 0.5


class RenyiDivergence(Part):
    """log Σ p^α q^(1-α) / (α-1): forward KL at α = 1."""

    kind: Literal["renyi"]
    alpha: Positive = 0.5


DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha", "renyi"
]
DivergenceWithParameter = Annotated[
    PlainDivergence | JensenShannon | SkewDivergence | AlphaDivergence | RenyiDivergence, Field(discriminator="kind")
]


class Tokens(Part):
    """Next tokens: weight · T² · divergence + cross_entropy · cross-entropy with the data's next token.

    `logits_dtype` is that of the two chunks of logits: `auto` is float32, bfloat16 is faster and drowns the gradient
    near convergence.
    """

    divergence: DivergenceName | DivergenceWithParameter = "forward_kl"
    temperature: Positive = 1.0
    weight: NonNegative = 1.0
    cross_entropy: NonNegative = 0.0
    temperature_squared: bool = True
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def divergence_kind(self) -> str:
        """The divergence's name, however it was written."""
        return self.divergence if isinstance(self.divergence, str) else self.divergence.kind

    @model_validator(mode="after")
    def _some_weight(self) -> Tokens:
        if self.weight == 0 and self.cross_entropy == 0:
            raise ValueError("weight and cross_entropy are both 0, so this stage would learn nothing from tokens")
        return self
