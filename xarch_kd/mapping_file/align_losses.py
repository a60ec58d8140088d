"""Losses of an `align` entry, one part each, so that the options of another are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xarch_kd.mapping_file.parts import NonNegative, Part, Positive

Weight = Positive | Literal["auto"]


class MeanSquaredError(Part):
    """Mean over the width of the squared difference."""

    kind: Literal["mse"]
    weight: Weight = 1.0
    standardise: bool = False


class RelativeMeanSquaredError(Part):
    """Squared difference over squared teacher norm, both summed over all unmasked tokens of the batch."""

    kind: Literal["relative_mse"]
    weight: Weight = 1.0
    standardise: bool = False


class Cosine(Part):
    """One minus the cosine of the angle, per token."""

    kind: Literal["cosine"]
    weight: Weight = 1.0
    standardise: bool = False


class NormalisedMeanSquaredError(Part):
    """Squared difference over squared teacher norm, per token."""

    kind: Literal["normalised_mse"]
    weight: Weight = 1.0
    epsilon: Positive = 1e-6
    standardise: bool = False


class Huber(Part):
    """Mean over the width of Huber's function of the difference: quadratic up to `delta`, linear beyond."""

    kind: Literal["huber"]
    weight: Weight = 1.0
    delta: Positive = 1.0
    standardise: bool = False


class EuclideanDistance(Part):
    """The length of the difference, per token: its gradient has the same size however near the student is."""

    kind: Literal["l2"]
    weight: Weight = 1.0
    standardise: bool = False


class CentredKernelAlignment(Part):
    """One minus the similarity (linear CKA, without bias) of student and teacher over the tokens of a micro-batch.

    It sees neither rotation nor scale, so it takes no projector and any widths. A micro-batch should have 4 tokens a
    dimension.
    """

    kind: Literal["cka"]
    weight: Weight = 1.0
    standardise: bool = False


class Gram(Part):
    """Distance of the tokens' products with each other, each token's row with length 1; any widths, no projector."""

    kind: Literal["gram"]
    weight: Weight = 1.0
    standardise: bool = False


class Relation(Part):
    """Divergence of how tokens relate to each other (MiniLMv2): softmax of their products in `heads` relation heads.

    Of the tap `values`, or, of the tap `mixing`, of its queries or its keys (C and B of a state-space model). `heads`
    must divide both models' widths of all heads together; by default as many as leave 32 numbers a head.
    """

    kind: Literal["relation"]
    of: Literal["queries", "keys"] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None
    weight: Weight = 1.0


class AttentionBridge(Part):
    """Queries and keys (C and B of a state-space model) of the student, through two learned maps, to the teacher's.

    The maps are those of `projector`, which `auto` leaves out where all widths agree. For the tap `mixing` alone.
    """

    kind: Literal["attention_bridge"]
    distance: Literal["normalised_mse", "mse", "cosine", "huber", "l2"] = "normalised_mse"
    epsilon: Positive = 1e-6
    delta: Positive = 1.0
    weight: Weight = 1.0


class MixingMatch(Part):
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
    weight: Weight = 1.0


FeatureLoss = (
    MeanSquaredError | RelativeMeanSquaredError | Cosine | NormalisedMeanSquaredError | Huber | EuclideanDistance
)
SimilarityLoss = CentredKernelAlignment | Gram
AlignLoss = Annotated[
    FeatureLoss | SimilarityLoss | Relation | AttentionBridge | MixingMatch, Field(discriminator="kind")
]
