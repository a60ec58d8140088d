"""Training settings of a stage: optimizer, schedule, held-out evaluation, averaging of weights, cache, adapters."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from xarch_kd.mapping_file.scalars import BelowOne, ConfigModel, Fraction, NonNegative, Number, Positive

DEFAULT_WARMUP: Final = 0.05
# Default learning rate of projectors that start in closed form, as a share of `lr`.
FITTED_RATE: Final = 0.1
# The names of `transformers.training_args.OptimizerNames`.
OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adafactor",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "stable_adamw",
]


def _plain_arguments(value: dict[str, object]) -> dict[str, object]:
    """Return the arguments. Raises `ValueError` unless they are numbers, text, truth values or lists of numbers."""
    for name, item in value.items():
        for entry in item if isinstance(item, tuple) else (item,):
            if not isinstance(entry, str | int | float) or (isinstance(entry, float) and not math.isfinite(entry)):
                raise ValueError(f"{name} is neither a number, text, true, false nor a list of numbers")
    return value


class Optimizer(ConfigModel):
    """Optimizer, learning rates and their schedule, gradient clipping.

    `optim` is a name of `transformers.TrainingArguments`, AdamW by default, and `args` are arguments of its class.
    `mixer_lr` is the rate of the mixers, those that `train: [mixers]` means; `projector_lr` and
    `projector_weight_decay` are those of projectors. By default they are `lr` and `weight_decay`, but a tenth of `lr`
    for projectors that start in closed form, which a step at the student's rate would take out of it.

    `warmup` is the share of the steps in which the rates rise from 0, `decay` the share in which `wsd` (warm-up,
    stable, decay) lets them fall. They fall to `min_lr`, for all parameters in proportion to that of `lr`.
    """

    optim: OptimizerName = "adamw_torch"
    args: Annotated[dict[str, object], AfterValidator(_plain_arguments)] = Field(default_factory=dict)
    lr: Positive = 1e-3
    min_lr: NonNegative = 0.0
    mixer_lr: Positive | None = None
    projector_lr: Positive | None = None
    weight_decay: NonNegative = 0.0
    projector_weight_decay: NonNegative | None = None
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup", "wsd"] = "cosine"
    warmup: Fraction = DEFAULT_WARMUP
    decay: Fraction | None = None
    max_grad_norm: Positive | Literal["off"] = 1.0

    def projector_rate(self, *, is_fitted: bool) -> float:
        """Return the learning rate of projectors, of those that start in closed form or of the others."""
        if self.projector_lr is not None:
            return self.projector_lr
        return self.lr * FITTED_RATE if is_fitted else self.lr

    @property
    def decay_share(self) -> float:
        """The share of the steps in which `wsd` falls, 0.2 by default."""
        return 0.2 if self.decay is None else self.decay

    @model_validator(mode="after")
    def _schedule_fits(self) -> Optimizer:
        is_constant = self.schedule in ("constant", "constant_with_warmup")
        if self.min_lr > 0 and is_constant:
            raise ValueError(f"min_lr is the rate at the end of cosine, linear and wsd; '{self.schedule}' has no end")
        if self.min_lr >= self.lr:
            raise ValueError(f"min_lr must be below lr, found min_lr {self.min_lr:g} and lr {self.lr:g}")
        # The default is left alone: it is also written when a mapping file is dumped whole.
        if self.schedule == "constant" and self.warmup not in (0.0, DEFAULT_WARMUP):
            raise ValueError("schedule: constant has no warm-up. Use schedule: constant_with_warmup, or warmup: 0")
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"decay is the last part of schedule: wsd; '{self.schedule}' has none")
        if self.schedule == "wsd" and self.warmup + self.decay_share > 1:
            raise ValueError(
                "warmup and decay are shares of the steps, together at most 1, found "
                f"{self.warmup + self.decay_share:g}"
            )
        return self


class StageEvaluation(ConfigModel):
    """Evaluation on held-out text every `every` steps of a stage, and after its last one.

    At most `batches` micro-batches of held-out rows are read. With `keep: best` the stage ends with the weights of the
    evaluation whose `metric` was lowest, with `last` with those of its last step. After `patience` evaluations in a row
    without a new lowest value the stage stops.
    """

    every: Annotated[int, Field(ge=1)]
    batches: Annotated[int, Field(ge=1)] = 8
    metric: Literal["loss", "nll"] = "loss"
    keep: Literal["best", "last"] = "last"
    patience: Annotated[int, Field(ge=1)] | None = None

    @property
    def compares(self) -> bool:
        """True if values of different steps are compared with each other."""
        return self.keep == "best" or self.patience is not None


class WeightAveraging(ConfigModel):
    """Exponential moving average of the student's weights: what is evaluated, and what the stage ends with.

    After step n the decay is min(decay, (1 + n) / (10 + n)). Projectors are not averaged.
    """

    decay: Annotated[Number, Field(gt=0, lt=1)] = 0.999


class Cache(ConfigModel):
    """Cache of the teacher's features of a stage: place and size limit."""

    where: Literal["memory", "disk", "off"] = "memory"
    limit_gib: Positive = 4.0


class Lora(ConfigModel):
    """Low-rank adapters of `rank`, times `alpha` / `rank`, on the linear modules of attention layers and MLPs."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Positive | None = None
    on: Annotated[tuple[Literal["attention", "mlp"], ...], Field(min_length=1)] = ("attention", "mlp")


class LoraPart(ConfigModel):
    """Entry of `train` for adapters."""

    lora: Lora
