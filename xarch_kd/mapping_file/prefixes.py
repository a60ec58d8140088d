"""Prefix sources of a stage: the mixture of data and sampled continuations, and presets of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from xarch_kd.mapping_file.scalars import ConfigModel, Fraction, NonNegative, Number

Source = Literal["data", "student", "teacher"]
SOURCES: Final[tuple[Source, ...]] = ("data", "student", "teacher")
PresetName = Literal["seqkd", "imitkd", "gkd", "distillm", "on_policy", "stable_on_policy"]
# Preset -> the settings that it stands for.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "seqkd": {"teacher": 1.0},
        "imitkd": {"data": 1.0, "schedule": {"kind": "linear", "to": {"student": 1.0}}},
        "gkd": {"data": 0.5, "student": 0.5},
        "distillm": {
            "data": 1.0,
            "schedule": {"kind": "adaptive", "to": {"student": 1.0}},
            "replay": {"capacity": 1000, "fresh": {"initial": 1.0, "final": 0.0}},
        },
        "on_policy": {"student": 1.0},
        "stable_on_policy": {
            "data": 0.2,
            "student": 0.6,
            "teacher": 0.2,
            "horizon": {"initial": 0.1, "end": 0.5},
            "collapse": {"action": "stop"},
        },
    }
)
# Shares are decimal fractions, whose sum is rounded.
ROUNDING: Final = 1e-9


class SampledSource(ConfigModel):
    """Continuations that one of the models samples: `share` of the micro-batches, and how their tokens are drawn.

    Greedy at temperature 0. `top_k` keeps the k most likely tokens, `top_p` the most likely ones that together have
    this probability, `min_p` those with at least this share of the most likely one's probability. By default a
    continuation fills the row, `data.sequence_length`. `seed` is added to that of the run.
    """

    share: Fraction = 0.0
    temperature: NonNegative = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    min_p: Fraction = 0.0
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Shares(ConfigModel):
    """Shares of the micro-batches of each prefix source, which sum to 1."""

    data: Fraction = 0.0
    student: Fraction = 0.0
    teacher: Fraction = 0.0

    @model_validator(mode="after")
    def _sum_to_one(self) -> Shares:
        _check_sum(self.data, self.student, self.teacher)
        return self


class MixtureSchedule(ConfigModel):
    """Way of the mixture from the stage's shares to the shares `to`.

    `linear` and `cosine` go it between `start` and `end`, fractions of the stage. `adaptive` starts at the stage's
    shares and goes on by `increment` after each evaluation of the stage whose metric is at least `tolerance` above the
    reference: that of the first evaluation, then of the last one that made it go on (DistiLLM, arXiv:2402.03898).
    """

    kind: Literal["linear", "cosine", "adaptive"] = "linear"
    to: Shares
    start: Fraction = 0.0
    end: Fraction = 1.0
    increment: Annotated[Number, Field(gt=0, le=1)] = 0.1
    tolerance: NonNegative = 0.1

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> MixtureSchedule:
        if not self.start < self.end:
            raise ValueError(f"start must be below end, found start {self.start:g} and end {self.end:g}")
        if self.kind == "adaptive" and {"start", "end"} & self.model_fields_set:
            raise ValueError("start and end are keys of linear and cosine: adaptive follows evaluations")
        return self


class Horizon(ConfigModel):
    """Length of continuations over the stage: the share `initial` of it at the start, all of it from `end` on."""

    kind: Literal["linear", "cosine"] = "linear"
    initial: Annotated[Number, Field(gt=0, le=1)] = 0.1
    end: Annotated[Number, Field(gt=0, le=1)] = 1.0


class FreshShare(ConfigModel):
    """Share of fresh continuations, which goes linearly from `initial` to `final` over the stage."""

    initial: Fraction
    final: Fraction


class Replay(ConfigModel):
    """Buffer of the last `capacity` rows that the student sampled, over all processes.

    The share `fresh` of the student's micro-batches is sampled anew and put into it; others are drawn from it, without
    rows that were sampled more than `max_age` optimizer steps ago.
    """

    capacity: Annotated[int, Field(ge=1)] = 1000
    max_age: Annotated[int, Field(ge=1)] | None = None
    fresh: Fraction | FreshShare = 0.5

    @property
    def fresh_share(self) -> FreshShare:
        """The share of fresh continuations, for both spellings."""
        fresh = self.fresh
        return fresh if isinstance(fresh, FreshShare) else FreshShare(initial=fresh, final=fresh)


class Collapse(ConfigModel):
    """Bounds on the student's continuations, over the last `window` micro-batches that it sampled.

    They have collapsed if less than `distinct_4` of the runs of four tokens of a continuation are distinct, or if more
    than `at_limit` of them reach the horizon without an end (1: not looked at). `action` warns once, or stops the run.
    """

    distinct_4: Fraction = 0.2
    at_limit: Annotated[Number, Field(gt=0, le=1)] = 1.0
    window: Annotated[int, Field(ge=1)] = 20
    action: Literal["warn", "stop"] = "warn"


class Prefixes(ConfigModel):
    """Sources of the token rows that a stage trains on, a mixture over its micro-batches.

    `data` are rows of the text. `student` and `teacher` continue the beginnings of such rows: what comes before the
    first token with a label, or the first `prompt_tokens` tokens, by default a quarter of the row. Which tokens count
    is the same for all sources. `preset` fills in settings, which the other keys change. A continuation ends with a
    token of `end_of_sequence`, by default the one that both models have in their generation configs.
    """

    preset: PresetName | None = None
    data: Fraction = 0.0
    student: Fraction | SampledSource = 0.0
    teacher: Fraction | SampledSource = 0.0
    schedule: MixtureSchedule | None = None
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    horizon: Horizon | None = None
    replay: Replay | None = None
    collapse: Collapse = Collapse()
    end_of_sequence: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, value: Any) -> Any:
        name = value.get("preset") if isinstance(value, dict) else None
        return {**PRESETS[name], **value} if isinstance(name, str) and name in PRESETS else value

    @model_validator(mode="after")
    def _shares_fit(self) -> Prefixes:
        shares = [self.share(source) for source in SOURCES]
        _check_sum(*shares)
        if self.data == 1 and self.schedule is None:
            raise ValueError("all prefixes are data, which is the default: leave prefixes out")
        if self.replay is not None and not self.is_sampled("student"):
            raise ValueError("replay keeps rows that the student sampled, and it samples none: give student a share")
        return self

    def source(self, name: Literal["student", "teacher"]) -> SampledSource:
        """Return how a model samples, however its share was written."""
        given = self.student if name == "student" else self.teacher
        return given if isinstance(given, SampledSource) else SampledSource(share=given)

    def share(self, name: Source) -> float:
        """Return the share of a source at the start of the stage."""
        return self.data if name == "data" else self.source(name).share

    def is_sampled(self, name: Literal["student", "teacher"]) -> bool:
        """Return True if this model samples at some step of the stage."""
        return self.share(name) > 0 or (self.schedule is not None and getattr(self.schedule.to, name) > 0)


def prefix_settings(value: PresetName | Prefixes) -> Prefixes:
    """Return the settings of a stage's prefixes, for both spellings."""
    return value if isinstance(value, Prefixes) else Prefixes.model_validate({"preset": value})


def _check_sum(data: float, student: float, teacher: float) -> None:
    total = data + student + teacher
    if abs(total - 1) > ROUNDING:
        raise ValueError(
            f"the shares of data, student and teacher must sum to 1, found {data:g} + {student:g} + {teacher:g} = "
            f"{total:g}"
        )
