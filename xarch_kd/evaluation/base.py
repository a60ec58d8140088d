"""Base of all suites: the two models that are evaluated, and the parts that a suite consists of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.data.batches import Batch
from xarch_kd.evaluation.cost import Cost
from xarch_kd.evaluation.likelihood import ModelPaths
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.rollouts import Rollouts, fitting_tokens, prompts_of, sample_both
from xarch_kd.evaluation.sizes import SIZES, Size
from xarch_kd.evaluation.statistics import LEVEL, RESAMPLES
from xarch_kd.mapping_file.schema import Speed
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import Layout, layout_of

if TYPE_CHECKING:
    from xarch_kd.evaluation.results import Evaluation


@dataclass(frozen=True, kw_only=True, eq=False)
class Subjects:
    """Teacher and student in evaluation mode, and the settings of all suites.

    `texts` are batches by name, `descriptions` the kind of each text; prompts are taken from the first text, and
    random tokens from the `tokenizer`. `level`, `resamples` and `seed` are those of the intervals; `seed` is that of
    the samples too. What several suites need is computed once.
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
    speed: Speed = field(default_factory=Speed)
    size: Size = SIZES["quick"]
    reporter: Reporter = field(default_factory=Reporter.silent)

    @functools.cached_property
    def layouts(self) -> tuple[Layout, Layout]:
        """The layouts of teacher and student."""
        return layout_of(self.teacher, self.teacher_paths), layout_of(self.student, self.student_paths)

    @property
    def first_text(self) -> Sequence[Batch]:
        """Batches of the first text. Raises NotMeasured without text."""
        if not self.texts:
            raise NotMeasured("there is no text to take prompts from", allowed="at least one text")
        return next(iter(self.texts.values()))

    @functools.cached_property
    def prompts(self) -> Tensor:
        """Prompts [prompts, tokens] of the first text. Raises NotMeasured without text."""
        return prompts_of(self.first_text, self.size)

    @property
    def new_tokens(self) -> int:
        """Tokens that are written after each prompt. Raises NotMeasured if there is no room for them."""
        return fitting_tokens((self.teacher, self.student), self.prompts.shape[1], self.size.new_tokens)

    @functools.cached_property
    def rollouts(self) -> Rollouts:
        """Continuations of the prompts by both models, sampled once for all suites. Raises NotMeasured."""
        return sample_both(self, self.prompts, self.new_tokens)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite: its measurement, and the forms of its result in `Evaluation.results`.

    `measure` returns the result, None for one that was left out by a setting, and raises NotMeasured for models or
    texts that it cannot serve. `to_json` and `from_json` convert a result to and from JSON data; `tables` are printed,
    `markdown` are the lines of the model card. `cost` returns the work of each part by name; parts of one name are done
    once for several suites.
    """

    measure: Callable[[Subjects], Any]
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]
    tables: Callable[[Evaluation], Iterable[RenderableType]]
    markdown: Callable[[Evaluation], Iterable[str]]
    cost: Callable[[Subjects], Mapping[str, Cost]] = lambda subjects: {}
    needs_text: bool = True
