"""The mapping file's schema: frozen pydantic models, foreign keys refused, scalars strict.

Each field has one owner here; nothing becomes a command-line flag by accident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Tap = Literal["embedding", "hidden", "mixer_input", "mixer_output", "mlp_output", "mixing", "head_input"]
Trainable = Literal["mixers", "blocks", "embeddings", "norms", "head", "all"]


def _number(value: object) -> object:
    """Return an integer as the float it stands for: strict floats would refuse `weight: 1`."""
    return float(value) if type(value) is int and abs(value) < 2**63 else value


def _version(value: object) -> object:
    """Return a version that is truly an integer: `true` and `1.0` equal 1 in Python."""
    if type(value) is not int or value != 1:
        raise ValueError("must be the number 1, the only version there is")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
LayerIndex = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Parent of every part of a mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Paths(Part):
    """Where the parts of a model outside the table of families are, as attribute paths.

    `blocks`, `embedding`, `final_norm` and `head` start at the model; `mixer` and `mlp` start at a block.
    """

    blocks: str
    mixer: str
    mlp: str | None = None
    embedding: str | None = None
    final_norm: str | None = None
    head: str | None = None


class Model(Part):
    """A model reference: hub id, local folder, `.gguf` file, or `package:distribution/file.gguf`."""

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Dtype = "float32"
    paths: Paths | None = None


class Conversion(Part):
    """How the teacher becomes a stock hybrid. Exactly one of `keep_attention` and `replace`, in the same language."""

    mixer: Literal["mamba2", "gated_delta"]
    keep_attention: str | tuple[LayerIndex, ...] | None = None
    replace: str | tuple[LayerIndex, ...] | None = None
    target: Literal["auto", "bamba", "granitemoehybrid", "qwen3_5", "olmo_hybrid", "in_place"] = "auto"
    initialisation: Literal["attention", "random"] = "attention"

    @model_validator(mode="after")
    def _one_selection(self) -> Conversion:
        if (self.keep_attention is None) == (self.replace is None):
            raise ValueError(
                "exactly one of keep_attention | replace must be given, "
                "e.g. keep_attention: every 4, or replace: [6, 13]"
            )
        return self


class Student(Part):
    """Exactly one of `model` (an existing student), `config` (built fresh from a config folder) or `convert`.

    `dtype` is what the student is saved in; while it trains, its weights are float32.
    """

    model: str | None = None
    config: str | None = None
    convert: Conversion | None = None
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    paths: Paths | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Student:
        given = [name for name in ("model", "config", "convert") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of model | config | convert must be given, found {' and '.join(given) or 'none'}"
            )
        return self


class Text(Part):
    """Exactly one of `builtin`, `files` (paths or glob patterns) and `dataset` (of the library `datasets`)."""

    builtin: Literal["python-docs", "python-sources", "licences"] | None = None
    files: tuple[str, ...] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    column: str = "text"

    @model_validator(mode="after")
    def _one_text(self) -> Text:
        given = [name for name in ("builtin", "files", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of builtin | files | dataset must be given, found {' and '.join(given) or 'none'}"
            )
        return self


class Data(Text):
    """Training text: tokenised by the teacher's tokenizer, packed into rows of `sequence_length` tokens.

    `held_out` is the share of documents (at least one) kept for evaluation; `batch_size` is rows per micro-batch.
    """

    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 4
    held_out: Annotated[Number, Field(gt=0, lt=1)] = 0.1


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
    projector: Literal["auto", "none", "linear"] = "auto"

    @model_validator(mode="after")
    def _loss_fits_the_tap(self) -> Align:
        if (self.tap == "mixing") != (self.loss.kind == "mixing"):
            raise ValueError(
                f"the loss '{self.loss.kind}' does not fit the tap '{self.tap}': mixing matrices are compared by "
                "loss: {kind: mixing}, and nothing else is"
            )
        if self.tap == "mixing" and self.projector == "linear":
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


class Optimizer(Part):
    """AdamW. `projector_lr` defaults to `lr`; `warmup` is a share of the stage's steps."""

    lr: Positive = 1e-3
    projector_lr: Positive | None = None
    weight_decay: NonNegative = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.05
    max_grad_norm: Positive = 1.0


class Cache(Part):
    """Where the teacher's features of an `inputs: teacher` stage are kept, and at most how much."""

    where: Literal["memory", "disk", "off"] = "memory"
    limit_gib: Positive = 4.0


class Stage(Part):
    """One `transformers.Trainer` run.

    `batches` bounds the number of different batches drawn: further steps go over them again in a new order, which
    with a cache costs no teacher pass. `precision` is the autocast type of the student's pass.
    """

    name: Name
    steps: Annotated[int, Field(ge=1)]
    train: tuple[Trainable, ...]
    inputs: Literal["teacher", "student"] = "student"
    align: tuple[Align, ...] = ()
    tokens: Tokens | None = None
    optimizer: Optimizer = Optimizer()
    batch_size: Annotated[int, Field(ge=1)] | None = None
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    batches: Annotated[int, Field(ge=1)] | None = None
    cache: Literal["memory", "disk", "off"] | Cache = "off"
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None

    @property
    def cache_place(self) -> Literal["memory", "disk", "off"]:
        """Where features are kept, however it was written."""
        return self.cache if isinstance(self.cache, str) else self.cache.where

    @property
    def cache_limit(self) -> int:
        """Bytes that the cache may take at most."""
        limit = (Cache() if isinstance(self.cache, str) else self.cache).limit_gib
        return int(limit) * 2**30 + int(limit % 1 * 2**30)

    @model_validator(mode="after")
    def _has_an_objective(self) -> Stage:
        if not self.align and self.tokens is None:
            raise ValueError("a stage needs at least one objective: give align and/or tokens")
        if len(self.train) == 0:
            raise ValueError("train is empty, so nothing would learn")
        twice = _given_twice(entry.name for entry in self.align)
        if twice:
            raise ValueError(f"names of align entries must differ, found twice: {twice}")
        return self


class Calibration(Part):
    """The pass that strategies which follow from data need: about so many `tokens` of the training text."""

    tokens: Annotated[int, Field(ge=64)] = 16_384


class Evaluate(Part):
    """What is measured when training is done: `tokens` at most of the held-out text, and of each of `also`."""

    suites: tuple[Literal["likelihood"], ...] = ("likelihood",)
    tokens: Annotated[int, Field(ge=64)] = 16_384
    also: tuple[Text, ...] = ()


class MappingFile(Part):
    """A whole mapping file."""

    version: Annotated[Literal[1], BeforeValidator(_version)]
    teacher: Model
    student: Student
    data: Data
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tracking: tuple[Literal["tensorboard", "wandb"], ...] = ()
    calibration: Calibration = Calibration()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> MappingFile:
        twice = _given_twice(stage.name for stage in self.stages)
        if twice:
            raise ValueError(f"stage names must differ, found twice: {twice}")
        return self


def _given_twice(names: Iterable[str]) -> str:
    return ", ".join(name for name, count in Counter(names).items() if count > 1)
