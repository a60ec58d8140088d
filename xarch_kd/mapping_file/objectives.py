"""Objectives of a mapping file: entries of `align` with their losses and schedules, and next-token distributions."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field, model_validator

from xarch_kd.mapping_file.layer_maps import LayerPair, LayerStrategy, StrategyName
from xarch_kd.mapping_file.losses import (
    LOSS_OPTIONS,
    AlignLoss,
    MixingMatch,
    NormalisedMeanSquaredError,
    Relation,
    Tap,
)
from xarch_kd.mapping_file.projectors import AnyProjector, PlainProjectorOptions, ProjectorName, ProjectorWithOptions
from xarch_kd.mapping_file.scalars import (
    BelowOne,
    ConfigModel,
    Fraction,
    Name,
    NonNegative,
    Number,
    Positive,
    kinds_of,
)


class Schedule(ConfigModel):
    """Schedule of a weight over its stage; `start` and `end` are fractions of the stage's steps.

    `constant`: the factor `initial` from start to end, and the objective is left out elsewhere. `linear` and `cosine`:
    from the factor `initial` at start to `final` at end.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    start: Fraction = 0.0
    end: Fraction = 1.0
    initial: NonNegative = 1.0
    final: NonNegative = 0.0

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
    have losses of their own. With `weight: auto` in its loss an entry gets the weight at which the norm of its
    gradient on the student equals, at the first steps, that of the tokens, or of the first entry with a number.
    `schedule` changes the weight over the stage. With `tokens: labelled` only tokens with a label count, as those of
    the assistant in a conversation; without labels these are all.
    """

    name: Name
    tap: Tap
    layers: StrategyName | LayerStrategy | tuple[LayerPair, ...] | None = None
    loss: Annotated[AlignLoss, Field(default_factory=_default_loss)]
    projector: ProjectorName | ProjectorWithOptions = "auto"
    schedule: Schedule | None = None
    tokens: Literal["all", "labelled"] = "all"

    @property
    def projector_part(self) -> AnyProjector:
        """The projector with all its options, however it was written."""
        return PlainProjectorOptions(kind=self.projector) if isinstance(self.projector, str) else self.projector

    @property
    def projector_kind(self) -> str:
        """The projector's kind, however it was written."""
        return self.projector if isinstance(self.projector, str) else self.projector.kind

    @property
    def weight(self) -> float:
        """The number that the entry's losses are multiplied by, 1 if it is balanced."""
        return 1.0 if self.loss.weight == "auto" else self.loss.weight

    @model_validator(mode="after")
    def _loss_fits_the_tap(self) -> Align:
        loss = self.loss
        if self.tap not in loss.taps:
            allowed = " | ".join(kinds_of(options for options in LOSS_OPTIONS if self.tap in options.taps))
            raise ValueError(
                f"the loss '{loss.kind}' does not fit the tap '{self.tap}', which is compared by {allowed}"
            )
        problem = loss.problem_at(self.tap)
        if problem is not None:
            raise ValueError(problem)
        if not loss.takes_projector(self.tap) and self.projector_kind not in ("auto", "none"):
            raise ValueError(f"the loss '{loss.kind}' takes no projector{loss.instead_of_projector}")
        return self


class PlainDivergence(ConfigModel):
    """A divergence without a parameter; its name alone is equivalent."""

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


class AlphaBetaDivergence(ConfigModel):
    """Σ [a p^s / s + b q^s / s - p^a q^b] / (a b), s = a + b, with alpha and beta above 0 (ABKD)."""

    kind: Literal["alpha_beta"]
    alpha: Positive = 0.2
    beta: Positive = 0.7


class EntropyAwareDivergence(ConfigModel):
    """KL(q ‖ p) where the teacher is sure, KL(p ‖ q) where the entropy of p is above `threshold`, in nats."""

    kind: Literal["entropy_aware"]
    threshold: NonNegative = 1.0


class AdaptiveDivergence(ConfigModel):
    """w KL(p ‖ q) + (1-w) KL(q ‖ p), w the share of Σ |p - q| in the teacher's likeliest entries (AKL).

    These have at most `head_mass` together, and are one at least.
    """

    kind: Literal["adaptive_kl"]
    head_mass: Fraction = 0.5


class CustomDivergenceOptions(ConfigModel):
    """Divergence passed from Python as `divergences={name: …}`."""

    kind: Literal["custom"]
    name: Name


DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha",
    "renyi",
    "alpha_beta",
    "entropy_aware",
    "adaptive_kl",
]
DivergenceWithParameter = Annotated[
    PlainDivergence
    | JensenShannon
    | SkewDivergence
    | AlphaDivergence
    | RenyiDivergence
    | AlphaBetaDivergence
    | EntropyAwareDivergence
    | AdaptiveDivergence
    | CustomDivergenceOptions,
    Field(discriminator="kind"),
]
DIVERGENCE_OPTIONS: Final[tuple[type[ConfigModel], ...]] = get_args(get_args(DivergenceWithParameter)[0])


class Tokens(ConfigModel):
    """Next tokens: weight · T² · divergence + cross_entropy · cross-entropy with the data's next token.

    With `top_k` the distributions that are compared are the teacher's k likeliest tokens and one bucket for all others.
    `schedule` changes both weights over the stage. `logits_dtype` is that of the two chunks of logits: `auto` is
    float32, bfloat16 is faster and drowns the gradient near convergence.
    """

    divergence: DivergenceName | DivergenceWithParameter = "forward_kl"
    temperature: Positive = 1.0
    weight: NonNegative = 1.0
    cross_entropy: NonNegative = 0.0
    temperature_squared: bool = True
    top_k: Annotated[int, Field(ge=1)] | None = None
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    schedule: Schedule | None = None

    @property
    def divergence_label(self) -> str:
        """Name of the divergence in tables."""
        if isinstance(self.divergence, CustomDivergenceOptions):
            return f"custom {self.divergence.name}"
        return self.divergence if isinstance(self.divergence, str) else self.divergence.kind

    @model_validator(mode="after")
    def _some_weight(self) -> Tokens:
        if self.weight == 0 and self.cross_entropy == 0:
            raise ValueError("weight and cross_entropy are both 0, so this stage would learn nothing from tokens")
        return self
