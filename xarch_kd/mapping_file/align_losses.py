"""Losses of an `align` entry, one part each, so that the options of another are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xarch_kd.mapping_file.parts import NonNegative, Part, Positive


class Objective(Part):
    """What every loss has: a weight, or `auto` for one that balances gradients."""

    weight: Positive | Literal["auto"] = 1.0


class FeatureObjective(Objective):
    """What losses of features have: whether the teacher's statistics standardise them first."""

    standardise: bool = False


class MeanSquaredError(FeatureObjective):
    """Mean over the width of the squared difference."""

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
    """Mean over the width of Huber's function of the difference: quadratic up to `delta`, linear beyond."""

    kind: Literal["huber"]
    delta: Positive = 1.0


class EuclideanDistance(FeatureObjective):
    """The length of the difference, per token: its gradient has the same size however near the student is."""

    kind: Literal["l2"]


class CentredKernelAlignment(FeatureObjective):
    """One minus the similarity (linear CKA, without bias) of student and teacher over the tokens of a micro-batch.

    It sees neither rotation nor scale, so it takes no projector and any widths. A micro-batch should have 4 tokens a
    dimension.
    """

    kind: Literal["cka"]


class Gram(FeatureObjective):
    """Distance of the tokens' products with each other, each token's row with length 1; any widths, no projector."""

    kind: Literal["gram"]


class Relation(Objective):
    """Divergence of how tokens relate to each other (MiniLMv2): softmax of their products in `heads` relation heads.

    Of the tap `values`, or, of the tap `mixing`, of its queries or its keys (C and B of a state-space model). `heads`
    must divide both models' widths of all heads together; by default as many as leave 32 numbers a head.
    """

    kind: Literal["relation"]
    of: Literal["queries", "keys"] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None


class AttentionBridge(Objective):
    """Queries and keys (C and B of a state-space model) of the student, through two learned maps, to the teacher's.

    The maps are those of `projector`, which `auto` leaves out where all widths agree. For the tap `mixing` alone.
    """

    kind: Literal["attention_bridge"]
    distance: Literal["normalised_mse", "mse", "cosine", "huber", "l2"] = "normalised_mse"
    epsilon: Positive = 1e-6
    delta: Positive = 1.0


class MixingMatch(Objective):
    """Distance of the rows of two token-mixing matrices, mean over rows and student heads; for the tap `mixing` alone.

    `heads` says what a student head learns from: `auto` is its own teacher head where the counts are equal, else `mean`
    (of a group of teacher heads) or `repeat` (a teacher head teaches a group); `assignment` is the cheapest one to one
    on calibration text, `learned` a mixture of teacher heads that is trained with the student; or non-negative weights
    [student heads, teacher heads] whose rows sum to 1. `probes` are those of `implementation: sketch`.
    """

    kind: Literal["mixing"]
    distance: Literal["cosine", "frobenius", "relative_frobenius", "kl", "cross_entropy"] = "cosine"
    heads: Literal["auto", "mean", "repeat", "assignment", "learned"] | tuple[tuple[NonNegative, ...], ...] = "auto"
    implementation: Literal["auto", "fused", "streaming", "panels", "sketch", "reference"] = "auto"
    probes: Annotated[int, Field(ge=2)] = 64


FeatureLoss = (
    MeanSquaredError | RelativeMeanSquaredError | Cosine | NormalisedMeanSquaredError | Huber | EuclideanDistance
)
SimilarityLoss = CentredKernelAlignment | Gram
AlignLoss = Annotated[
    FeatureLoss | SimilarityLoss | Relation | AttentionBridge | MixingMatch, Field(discriminator="kind")
]
