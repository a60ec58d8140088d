"""Plan: a mapping file resolved and checked against both configs, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xarch_kd.display import AsIs, as_html, as_text
from xarch_kd.errors import UsageError
from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.mapping_file.schema import ConversionOptions, MappingFile, Stage
from xarch_kd.planning.disk import DiskUse, disk_use

if TYPE_CHECKING:
    from rich.console import RenderableType

    from xarch_kd.planning.cost import Rates
    from xarch_kd.planning.custom import CustomObjects
    from xarch_kd.planning.layer_choice import LayerSelection
    from xarch_kd.planning.low_rank import LoraPlan
    from xarch_kd.planning.models import ModelPair


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One block of a model: its index, its mixer's kind, and whether conversion replaced that mixer."""

    index: int
    mixer: str
    replaced: bool


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Summary of a model's config. `parameters` counts tied weights once."""

    reference: str
    model_type: str
    layers: tuple[LayerRow, ...]
    dim: int
    vocabulary: int
    parameters: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """One student site learning from one teacher site. `layer` is None for `embedding` and `head_input`.

    `name` is unique in the stage (`mixer-output.6`): it names the loss part and the log entry. `projector_key` names
    the pair's projector, which it may share with others; its parameters are counted at the first of them. `weight` is
    the entry's number times the layer map's, `teacher_scale` what the teacher's features are multiplied by,
    `shared_basis` whether the student's dimensions are the teacher's. Heads are those of mixing matrices, None for
    other taps and for mixers whose config has no head count; `bridge` are (student, teacher) sizes of queries and keys.
    """

    name: str
    align: str
    tap: str
    student_layer: int | None
    teacher_layer: int | None
    student_dim: int
    teacher_dim: int
    projector: str
    projector_parameters: int
    loss: str
    weight: float
    projector_key: str = ""
    teacher_scale: float = 1.0
    shared_basis: bool = False
    student_heads: int | None = None
    teacher_heads: int | None = None
    bridge: tuple[tuple[int, int], tuple[int, int]] | None = None


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, resolved. Bytes and FLOPs are estimates for one machine; see `cost.py` for their derivation.

    A stage of `epochs` has no number of steps before the text was read (`is_open`; `resolve.with_steps` gives it one):
    until then `tokens`, `flops`, `seconds`, `distinct_batches` and `cache_bytes` are those of one step.

    `layer_map_plots` are the layer maps of the `align` entries by name, drawn; `mixers` those of `trainable` with
    `mixer_lr` as their rate; `lora` are the adapters that train.
    """

    index: int
    stage: Stage
    pairs: tuple[PairPlan, ...]
    trainable: tuple[str, ...]
    trainable_parameters: int
    projector_parameters: int
    batch_size: int
    distinct_batches: int
    tokens_per_step: int
    tokens: int
    cache_bytes: int
    flops: float
    seconds: float
    peak_bytes: int
    layer_map_plots: tuple[tuple[str, str], ...] = ()
    mixers: tuple[str, ...] = ()
    lora: LoraPlan | None = None

    @property
    def folder(self) -> str:
        """Name of the stage's folder inside the run folder, e.g. `01-mixers`."""
        return f"{self.index + 1:02d}-{self.stage.name}"

    @property
    def is_open(self) -> bool:
        """True for a stage of epochs whose number of steps depends on text that was not read yet."""
        return self.stage.steps is None

    @property
    def steps(self) -> int:
        """The number of optimizer steps. Raises UsageError if it depends on text that was not read yet."""
        if self.stage.steps is None:
            raise UsageError(
                f"the number of steps of stage '{self.stage.name}' depends on the text",
                asked=f"epochs: {self.stage.epochs:g}",
                fix="train the plan with xarch_kd.train, which reads the text, or give the stage steps instead",
            )
        return self.stage.steps

    def align_of(self, pair: PairPlan) -> Align:
        """The `align` entry that `pair` came from."""
        return next(entry for entry in self.stage.align if entry.name == pair.align)


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A mapping file resolved and checked against both models' configs: all that `train` needs.

    `source` is the mapping file's text. `student_config` is the student's config as a dict (of the class named by its
    `model_type`); `trainable` of each stage lists parameter names of the student. `models` are both models without
    storage, `rates` the matrix-product rates behind the estimated times. `uncalibrated` are the entries, as (stage
    index, name), whose layer map follows from a calibration pass that has not run yet: `uniform` is a placeholder for
    it. `similarities` are the measured ones, [student layers][teacher layers] by `stage.entry`. `selection` are the
    measurements behind the layers of a conversion that chooses them by a strategy; until they are there
    (`is_unselected`), evenly spaced layers stand in their place.

    >>> import xarch_kd as xkd
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> plan = xkd.plan("mapping.yaml")
    >>> [row.mixer for row in plan.student.layers]
    ['attention', 'mamba2', 'attention']
    """

    mapping: MappingFile
    source: str
    path: Path | None
    teacher: ModelSummary
    student: ModelSummary
    student_config: dict[str, Any]
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    models: ModelPair = field(compare=False)
    rates: Rates
    uncalibrated: tuple[tuple[int, str], ...] = ()
    similarities: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    @property
    def conversion(self) -> ConversionOptions | None:
        """The conversion with a plain list of layers, also where the mapping has a strategy. None without one."""
        return self.models.conversion

    @property
    def selection(self) -> LayerSelection | None:
        """Measurements that the layers of the conversion were chosen by."""
        return self.models.selection

    @property
    def is_unselected(self) -> bool:
        """True if the layers of the conversion are still to be chosen by measurement."""
        asked = self.mapping.student.convert
        strategy = None if asked is None else asked.selection
        return isinstance(strategy, LayerStrategy) and strategy.is_measured and self.selection is None

    def __repr__(self) -> str:
        from xarch_kd.planning.render import render_summary

        return as_text(render_summary(self), more="rich.print(plan) shows the whole plan")

    def __rich__(self) -> RenderableType:
        from xarch_kd.planning.render import render_plan

        return AsIs(render_plan(self))

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def timing_assumptions(self) -> str:
        """The assumptions behind the estimated times, in one line."""
        return self.rates.timing_assumptions

    @property
    def disk(self) -> DiskUse:
        """Bytes that the run writes to its folder, a forecast."""
        return disk_use(self.stages, self.mapping.student, self.student.parameters)

    @property
    def serving(self) -> list[tuple[str, str, str, str]]:
        """Rows about the servers that run such a student, with `SERVING_COLUMNS`; empty if its class is not known."""
        from xarch_kd.models.serving import serving_rows

        return serving_rows(self.models.student.config)

    @property
    def custom(self) -> CustomObjects:
        """The objects passed from Python."""
        return self.models.custom
