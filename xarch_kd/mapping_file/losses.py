"""Losses of a mapping file's `align` entries: their options, and facts of each kind."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import Field

from xarch_kd.mapping_file.scalars import ConfigModel, Name, NonNegative, Positive

Tap = Literal["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output", "values", "mixing", "head_input"]
# Taps of vectors [batch, time, dim]; the other two are token-mixing matrices and what these are applied to, by head.
FEATURE_TAPS: Final[tuple[Tap, ...]] = (
    "embedding",
    "hidden",
    "mixer_input",
    "mixer_output",
    "mlp_output",
    "head_input",
)


class LossOptions(ConfigModel):
    """Options of every loss. `weight: auto` balances gradients.

    Class variables are facts of a kind of loss: the `taps` that it compares, whether a projector stands between it and
    the student (`is_projected`), and the number of tokens per dimension below which a micro-batch is too noisy for it
    (`tokens_per_dim`, 0 for any).
    """

    taps: ClassVar[tuple[Tap, ...]] = FEATURE_TAPS
    is_projected: ClassVar[bool] = False
    tokens_per_dim: ClassVar[int] = 0
    # Added to the message that refuses a projector.
    instead_of_projector: ClassVar[str] = ""

    weight: Positive | Literal["auto"] = 1.0

    @property
    def label(self) -> str:
        """Name of the loss in tables."""
        return str(self.kind)  # type: ignore[attr-defined]  # each loss has a kind of its own

    @property
    def is_standardized(self) -> bool:
        """Features are standardized with the teacher's statistics before they are compared."""
        return False

    @property
    def is_scale_free(self) -> bool:
        """The loss depends on directions alone, so that a projector's scale is left to chance."""
        return False

    def takes_projector(self, tap: Tap) -> bool:
        """Return true if a projector stands between the student and this loss at `tap`."""
        return self.is_projected

    def problem_at(self, tap: Tap) -> str | None:
        """Return why these options do not fit `tap`, one of `taps`, or None."""
        return None


class FeatureLossOptions(LossOptions):
    """Options of losses of features: `standardize` with the teacher's statistics first."""

    standardize: bool = False

    @property
    def is_standardized(self) -> bool:
        """Features are standardized with the teacher's statistics before they are compared."""
        return self.standardize


class DistanceOptions(FeatureLossOptions):
    """Options of distances between the vectors of a token, which need equal dimensions: a projector provides them."""

    is_projected: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the distance by name."""
        return self.model_dump(exclude={"kind", "weight", "standardize"})


class MeanSquaredError(DistanceOptions):
    """Mean over the dimensions of the squared difference."""

    kind: Literal["mse"]


class RelativeMeanSquaredError(DistanceOptions):
    """Squared difference over squared teacher norm, both summed over all unmasked tokens of the batch."""

    kind: Literal["relative_mse"]


class Cosine(DistanceOptions):
    """One minus the cosine of the angle, per token."""

    kind: Literal["cosine"]

    @property
    def is_scale_free(self) -> bool:
        """The loss depends on directions alone."""
        return True


class NormalisedMeanSquaredError(DistanceOptions):
    """Squared difference over squared teacher norm, per token."""

    kind: Literal["normalised_mse"]
    epsilon: Positive = 1e-6


class Huber(DistanceOptions):
    """Mean over the dimensions of Huber's function of the difference: quadratic up to `delta`, linear beyond."""

    kind: Literal["huber"]
    delta: Positive = 1.0


class EuclideanDistance(DistanceOptions):
    """The length of the difference, per token: a gradient of constant norm."""

    kind: Literal["l2"]


class CenteredKernelAlignment(FeatureLossOptions):
    """One minus the similarity (linear CKA, without bias) of student and teacher over the tokens of a micro-batch.

    It is invariant to rotation and scale, so it takes no projector, whatever the dimensions. A micro-batch should have
    4 tokens per dimension.
    """

    tokens_per_dim: ClassVar[int] = 4

    kind: Literal["cka"]


class Gram(FeatureLossOptions):
    """Distance between the tokens' Gram matrices, whose rows are normalized; no projector."""

    kind: Literal["gram"]


class Relation(LossOptions):
    """Divergence between relations of tokens (MiniLMv2): the softmax of their products in `heads` relation heads.

    Of the tap `values`, or, of the tap `mixing`, of its queries or its keys (C and B of a state-space model). `heads`
    must divide both models' dimensions of all heads together; by default so many that each has 32 dimensions.
    """

    taps: ClassVar[tuple[Tap, ...]] = ("values", "mixing")

    kind: Literal["relation"]
    of: Literal["queries", "keys"] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None

    def problem_at(self, tap: Tap) -> str | None:
        """Return why `of` does not fit `tap`, or None."""
        if (tap == "mixing") == (self.of is not None):
            return None
        return "relations of the tap 'mixing' need of: queries or of: keys; those of the tap 'values' have no 'of'"


class AttentionBridge(LossOptions):
    """Distance from the student's queries and keys (C and B), each through a learned map, to the teacher's.

    The maps are those of `projector`, which `auto` leaves out where all dimensions agree. For the tap `mixing` alone.
    """

    taps: ClassVar[tuple[Tap, ...]] = ("mixing",)
    is_projected: ClassVar[bool] = True

    kind: Literal["attention_bridge"]
    distance: Literal["normalised_mse", "mse", "cosine", "huber", "l2"] = "normalised_mse"
    epsilon: Positive = 1e-6
    delta: Positive = 1.0

    @property
    def is_scale_free(self) -> bool:
        """The loss depends on directions alone."""
        return self.distance == "cosine"


class MixingMatch(LossOptions):
    """Distance of the rows of two token-mixing matrices, mean over rows and student heads; for the tap `mixing` alone.

    `heads` selects the target of a student head: `auto` is its own teacher head if the counts are equal, else `mean`
    (of a group of teacher heads) or `repeat` (a teacher head teaches a group); `assignment` is the cheapest one to one
    on calibration text, `learned` a mixture of teacher heads that is trained with the student; or non-negative weights
    [student heads, teacher heads] whose rows sum to 1. `probes` are those of `impl: sketch`.
    """

    taps: ClassVar[tuple[Tap, ...]] = ("mixing",)
    instead_of_projector: ClassVar[str] = "; unequal heads are bridged by loss: {heads: …}"

    kind: Literal["mixing"]
    distance: Literal["cosine", "frobenius", "relative_frobenius", "kl", "cross_entropy"] = "cosine"
    heads: Literal["auto", "mean", "repeat", "assignment", "learned"] | tuple[tuple[NonNegative, ...], ...] = "auto"
    impl: Literal["auto", "fused", "streaming", "panels", "sketch", "reference"] = "auto"
    probes: Annotated[int, Field(ge=2)] = 64

    @property
    def label(self) -> str:
        """Name of the distance in tables."""
        return self.distance


class CustomLossOptions(LossOptions):
    """Loss passed from Python as `objectives={name: …}`, at any tap; at taps of features after a projector."""

    taps: ClassVar[tuple[Tap, ...]] = (*FEATURE_TAPS, "values", "mixing")
    is_projected: ClassVar[bool] = True

    kind: Literal["custom"]
    name: Name

    @property
    def label(self) -> str:
        """Name of the loss in tables."""
        return f"custom {self.name}"

    def takes_projector(self, tap: Tap) -> bool:
        """Return true for taps of features."""
        return tap in FEATURE_TAPS


AlignLoss = Annotated[
    MeanSquaredError
    | RelativeMeanSquaredError
    | Cosine
    | NormalisedMeanSquaredError
    | Huber
    | EuclideanDistance
    | CenteredKernelAlignment
    | Gram
    | Relation
    | AttentionBridge
    | MixingMatch
    | CustomLossOptions,
    Field(discriminator="kind"),
]
LOSS_OPTIONS: Final[tuple[type[LossOptions], ...]] = get_args(get_args(AlignLoss)[0])
