"""Base of all suites: the two models that are evaluated, and the parts that a suite consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.evaluation.likelihood import ModelPaths
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES
from xarch_kd.mapping_file.schema import Speed
from xarch_kd.run.report import Reporter

if TYPE_CHECKING:
    from xarch_kd.evaluation.results import Evaluation


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """Teacher and student in evaluation mode, and the settings of all suites.

    `texts` are batches by name, `descriptions` the kind of each text. `copying` is the number of lists of random tokens
    of the `tokenizer` by which copying is measured. `level`, `resamples` and `seed` are those of the
    intervals.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    teacher_paths: ModelPaths = None
    student_paths: ModelPaths = None
    texts: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)
    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    copying: int = 24
    speed: Speed = field(default_factory=Speed)
    reporter: Reporter = field(default_factory=Reporter.silent)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite: its measurement, and the forms of its result, the field of `Evaluation` of the same name.

    `measure` returns the result; `to_json` and `from_json` convert it to and from JSON data; `tables` are printed,
    `markdown` are the lines of the model card.
    """

    measure: Callable[[Subjects], Any]
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]
    tables: Callable[[Evaluation], Iterable[RenderableType]]
    markdown: Callable[[Evaluation], Iterable[str]]
