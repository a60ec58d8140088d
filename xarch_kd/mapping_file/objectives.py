"""The objectives of a mapping file: what is matched, between which layers, through what, by which loss, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, model_validator

from xarch_kd.mapping_file.layer_maps import LayerPair, LayerStrategy, StrategyName
from xarch_kd.mapping_file.projectors import AnyProjector, PlainProjector, ProjectorName, ProjectorWithOptions
from xarch_kd.mapping_file.scalars import BelowOne, ConfigModel, Fraction, Name, NonNegative, Number, Positive

if TYPE_CHECKING:
    from xarch_kd.losses.schedules import WeightSchedule

Tap = Literal["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output", "values", "mixing", "head_input"]
# What a mixer gives without the block around it.
MIXER_TAPS: Final = frozenset({"mixer_output", "mixing", "values"})
# Losses of the taps that are no features; every other loss is for features.
LOSSES: Final[dict[str, tuple[str, ...]]] = {
    "mixing": ("mixing", "relation", "attention_bridge"),
    "values": ("relation",),
}
FEATURE_LOSSES: Final = ("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2", "cka", "gram")
# Losses between which and the student stands a projector.
PROJECTED: Final = ("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2", "attention_bridge")


class Objective(ConfigModel):
    """Options of every loss: a weight, or `auto` for one that balances gradients."""

    weight: Positive | Literal["auto"] = 1.0


class FeatureObjective(Objective):
    """Options of feature losses: `standardize` with the teacher's statistics."""

    standardize: bool = False


class MeanSquaredError(FeatureObjective):
    """Mean over the dimensions of the squared difference."""

    kind: Literal["mse"]


class RelativeMeanSquaredError(FeatureObjective):
    """Squared difference over squared teacher norm, both summed over all unmasked tokens of the batch."""

    kind: Literal["relative_mse"]


class Cosine(FeatureObjective):
    """One minus the cosine of the angle, per token."""

    kind: Literal["cosine"]


class NormalisedMeanSquaredError(FeatureObjective):
    """Squared difference over squared teacher norm, per token."""

    kind: Literal["normalised_mse"]
    epsilon: Positive = 1e-6


class Huber(FeatureObjective):
    """Mean over the dimensions of Huber's function of the difference: quadratic up to `delta`, linear beyond."""

    kind: Literal["huber"]
    delta: Positive = 1.0


class EuclideanDistance(FeatureObjective):
    """The length of the difference, per token: its gradient has the same size however near the student is."""

    kind: Literal["l2"]


class CentredKernelAlignment(FeatureObjective):
    """One minus the similarity (linear CKA, without bias) of student and teacher over the tokens of a micro-batch.

    It sees neither rotation nor scale, so it takes no projector, whatever the dimensions. A micro-batch should have 4
    tokens per dimension.
    """

    kind: Literal["cka"]


class Gram(FeatureObjective):
    """Distance of the tokens' products with each other, each token's row with length 1; no projector."""

    kind: Literal["gram"]


class Relation(Objective):
    """Divergence of how tokens relate to each other (MiniLMv2): softmax of their products in `heads` relation heads.

    Of the tap `values`, or, of the tap `mixing`, of its queries or its keys (C and B of a state-space model). `heads`
    must divide both models' dimensions of all heads together; by default as many as leave 32 dimensions per head.
    """

    kind: Literal["relation"]
    of: Literal["queries", "keys"] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None


class AttentionBridge(Objective):
    """Queries and keys (C and B of a state-space model) of the student, through two learned maps, to the teacher's.

    The maps are those of `projector`, which `auto` leaves out where all dimensions agree. For the tap `mixing` alone.
    """

    kind: Literal["attention_bridge"]
    distance: Literal["normalised_mse", "mse", "cosine", "huber", "l2"] = "normalised_mse"
    epsilon: Positive = 1e-6
    delta: Positive = 1.0


class MixingMatch(Objective):
    """Distance of the rows of two token-mixing matrices, mean over rows and student heads; for the tap `mixing` alone.

    `heads` maps teacher heads to student heads: `auto` is one to one if the counts are equal, else `mean`
    (of a group of teacher heads) or `repeat` (a teacher head teaches a group); `assignment` is the cheapest one to one
    on calibration text, `learned` a mixture of teacher heads that is trained with the student; or non-negative weights
    [student heads, teacher heads] whose rows sum to 1. `probes` are those of `impl: sketch`.
    """

    kind: Literal["mixing"]
    distance: Literal["cosine", "frobenius", "relative_frobenius", "kl", "cross_entropy"] = "cosine"
    heads: Literal["auto", "mean", "repeat", "assignment", "learned"] | tuple[tuple[NonNegative, ...], ...] = "auto"
    impl: Literal["auto", "fused", "streaming", "panels", "sketch", "reference"] = "auto"
    probes: Annotated[int, Field(ge=2)] = 64


FeatureLoss = (
    MeanSquaredError | RelativeMeanSquaredError | Cosine | NormalisedMeanSquaredError | Huber | EuclideanDistance
)


SimilarityLoss = CentredKernelAlignment | Gram


AlignLoss = Annotated[
    FeatureLoss | SimilarityLoss | Relation | AttentionBridge | MixingMatch, Field(discriminator="kind")
]


class Schedule(ConfigModel):
    """Schedule of a weight over its stage; `start` and `end` are fractions of the stage's steps.

    `constant`: the factor `initial` from start to end, and the objective left out outside. `linear` and `cosine`: from
    the factor `initial` at start to `final` at end.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    start: Fraction = 0.0
    end: Fraction = 1.0
    initial: NonNegative = 1.0
    final: NonNegative = 0.0

    @property
    def schedule(self) -> WeightSchedule:
        """The schedule itself."""
        # Here, because a faulty file is refused before torch is loaded.
        from xarch_kd.losses.schedules import WeightSchedule

        return WeightSchedule(**self.model_dump())

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Schedule:
        if not self.start < self.end:
            raise ValueError(f"start must be below end, found start {self.start:g} and end {self.end:g}")
        return self


def _default_loss(validated: dict[str, object]) -> AlignLoss:
    if validated.get("tap") == "mixing":
        return MixingMatch(kind="mixing")
    if validated.get("tap") == "values":
        return Relation(kind="relation")
    return NormalisedMeanSquaredError(kind="normalised_mse")


class Align(ConfigModel):
    """A tap of student blocks matched to the same tap of teacher blocks.

    `layers`: a strategy (`same` is block i to block i, `replaced` the same for blocks whose mixer was replaced,
    `uniform` end-aligned; `cka`, `monotone` and `optimal_transport` follow from a calibration pass, `learned` is
    trained with the student), or explicit pairs. `embedding` and `head_input` have no layers. `mixing` and `values`
    have losses of their own. With `weight: auto` in its loss an entry gets the weight at which its gradient on the
    student is as large, at the first steps, as that of the tokens, or of the first entry with a number. `schedule`
    changes the weight over the stage.
    """

    name: Name
    tap: Tap
    layers: StrategyName | LayerStrategy | tuple[LayerPair, ...] | None = None
    loss: Annotated[AlignLoss, Field(default_factory=_default_loss)]
    projector: ProjectorName | ProjectorWithOptions = "auto"
    schedule: Schedule | None = None

    @property
    def projector_part(self) -> AnyProjector:
        """The projector with all its options, however it was written."""
        return PlainProjector(kind=self.projector) if isinstance(self.projector, str) else self.projector

    @property
    def projector_kind(self) -> str:
        """The projector's kind, however it was written."""
        return self.projector if isinstance(self.projector, str) else self.projector.kind

    @property
    def weight(self) -> float:
        """The number that the entry's losses are multiplied by, 1 where it is balanced."""
        return 1.0 if self.loss.weight == "auto" else self.loss.weight

    @model_validator(mode="after")
    def _loss_fits_the_tap(self) -> Align:
        allowed = LOSSES.get(self.tap, FEATURE_LOSSES)
        if self.loss.kind not in allowed:
            raise ValueError(
                f"the loss '{self.loss.kind}' does not fit the tap '{self.tap}', which is compared by "
                f"{' | '.join(allowed)}"
            )
        if self.loss.kind == "relation" and (self.tap == "mixing") != (self.loss.of is not None):
            raise ValueError(
                "relations of the tap 'mixing' need of: queries or of: keys; those of the tap 'values' have no 'of'"
            )
        if self.loss.kind not in PROJECTED and self.projector_kind not in ("auto", "none"):
            hint = "; unequal heads are bridged by loss: {heads: …}" if self.loss.kind == "mixing" else ""
            raise ValueError(f"the loss '{self.loss.kind}' takes no projector{hint}")
        return self


def is_projected(loss: AlignLoss) -> bool:
    """Return True if this loss takes a projector."""
    return loss.kind in PROJECTED


def is_standardized(loss: AlignLoss) -> bool:
    """Return True if features are standardized with the teacher's statistics."""
    return bool(getattr(loss, "standardize", False))


class PlainDivergence(ConfigModel):
    """Divergence without parameters; its name alone is equivalent."""

    kind: Literal["forward_kl", "reverse_kl", "total_variation"]


class JensenShannon(ConfigModel):
    """β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q; `normalised` divides by β(1-β)."""

    kind: Literal["jsd"]
    beta: Fraction = 0.5
    normalised: bool = False


class SkewDivergence(ConfigModel):
    """KL(p ‖ α p + (1-α) q), or KL(q ‖ α q + (1-α) p)."""

    kind: Literal["skew_forward_kl", "skew_reverse_kl"]
    alpha: BelowOne = 0.1


class AlphaDivergence(ConfigModel):
    """(Σ p^α q^(1-α) - 1) / (α(α-1)): forward KL at α = 1, reverse KL at α = 0."""

    kind: Literal["alpha"]
    alpha: Number = 0.5


class RenyiDivergence(ConfigModel):
    """log Σ p^α q^(1-α) / (α-1): forward KL at α = 1."""

    kind: Literal["renyi"]
    alpha: Positive = 0.5


DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha", "renyi"
]
DivergenceWithParameter = Annotated[
    PlainDivergence | JensenShannon | SkewDivergence | AlphaDivergence | RenyiDivergence, Field(discriminator="kind")
]


class Tokens(ConfigModel):
    """Next tokens: weight · T² · divergence + cross_entropy · cross-entropy with the data's next token.

    `schedule` changes both weights over the stage. `logits_dtype` is that of the two chunks of logits: `auto` is
    float32, bfloat16 is faster and drowns the gradient near convergence.
    """

    divergence: DivergenceName | DivergenceWithParameter = "forward_kl"
    temperature: Positive = 1.0
    weight: NonNegative = 1.0
    cross_entropy: NonNegative = 0.0
    temperature_squared: bool = True
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    schedule: Schedule | None = None

    @property
    def divergence_kind(self) -> str:
        """The divergence's name, however it was written."""
        return self.divergence if isinstance(self.divergence, str) else self.divergence.kind

    @model_validator(mode="after")
    def _some_weight(self) -> Tokens:
        if self.weight == 0 and self.cross_entropy == 0:
            raise ValueError("weight and cross_entropy are both 0, so this stage would learn nothing from tokens")
        return self
