"""Objects passed from Python, by the names under which a mapping file refers to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from xarch_kd.errors import UsageError, suggest
from xarch_kd.layer_mapping import LayerMap, build_layer_map
from xarch_kd.mapping_file.layer_maps import CustomStrategy
from xarch_kd.mapping_file.losses import CustomLossOptions
from xarch_kd.mapping_file.objectives import CustomDivergenceOptions
from xarch_kd.mapping_file.projectors import CustomProjectorOptions
from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.ops.divergences import DivergenceFormula


class CustomObjective(Protocol):
    """Loss of one student/teacher layer pair on one micro-batch.

    `student` [batch, time, student dim] and `teacher` [batch, time, teacher dim] are features of the entry's tap: after
    the projector if the entry has one, float32; for the tap `values` [batch, time, heads, dim], for the tap `mixing`
    two `Mixing`. `mask` [batch, time] is true where a token counts, None where all do. Returns a scalar, the mean over
    the tokens that count. Micro-batches are weighted by their number of tokens. The teacher gets no gradient.
    """

    def __call__(self, student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
        """Return the loss of the pair, a scalar."""
        ...


class CustomDivergence(Protocol):
    """Divergence between next-token distributions.

    `log_q` and `log_p` are log-probabilities [tokens, vocabulary] of student and teacher at the stage's temperature, of
    a few hundred tokens at a time. Returns one value per token, [tokens], differentiable in `log_q`.
    """

    def __call__(self, *, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the divergence of each token, [tokens]."""
        ...


class CustomLayerMap(Protocol):
    """Layer map from the depths of both models.

    Returns a `LayerMap` or its weights [student layers, teacher layers]: non-negative, rows that sum to 1 or are 0.
    """

    def __call__(self, student_layers: int, teacher_layers: int) -> LayerMap | Tensor:
        """Return the layer map of two models with these numbers of layers."""
        ...


class ProjectorFactory(Protocol):
    """Factory of projectors, e.g. a module class: one module is built per pair, and trained and saved with the run.

    The module maps student features [..., student dim] to [..., teacher dim].
    """

    def __call__(self, student_dim: int, teacher_dim: int) -> nn.Module:
        """Return a module for these two dims."""
        ...


@dataclass(frozen=True, kw_only=True)
class CustomObjects:
    """The objects that a caller passed, by kind and name. Raises UsageError for one that does not fit."""

    objectives: Mapping[str, CustomObjective] = field(default_factory=dict)
    divergences: Mapping[str, CustomDivergence | DivergenceFormula] = field(default_factory=dict)
    layer_maps: Mapping[str, CustomLayerMap] = field(default_factory=dict)
    projectors: Mapping[str, ProjectorFactory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, name, passed in self._all():
            if not callable(passed) and not isinstance(passed, DivergenceFormula):
                raise UsageError(
                    f"An object of {kind}= cannot be called.",
                    asked=f"{kind}={{{name!r}: …}}",
                    found=type(passed).__name__,
                    allowed="a function, a class or an object with __call__",
                )
            if kind == "objectives" and isinstance(passed, nn.Module) and any(True for _ in passed.parameters()):
                raise UsageError(
                    f"The objective '{name}' has parameters, and nothing would train or save them.",
                    asked=f"objectives={{{name!r}: …}}",
                    found=type(passed).__name__,
                    fix="put what trains into a projector (projectors=), and constants into buffers",
                )
        for name in self.divergences:
            self.divergence(name)

    @classmethod
    def of(cls, **kinds: Mapping[str, Any] | None) -> CustomObjects:
        """Return the objects by kind, where None stands for no object."""
        return cls(**{kind: dict(passed) for kind, passed in kinds.items() if passed is not None})

    @classmethod
    def stand_ins(cls, mapping: MappingFile) -> CustomObjects:
        """Return objects for every custom name of a mapping file whose run is measured and not trained.

        Layer maps are uniform and projectors linear; objectives and divergences raise UsageError when computed.
        """

        def missing(*args: object, **kwargs: object) -> Tensor:
            raise UsageError("The objects of this run were not passed.", fix="train from the plan that has them")

        def layer_map(student_layers: int, teacher_layers: int) -> LayerMap:
            return build_layer_map("uniform", student_layers, teacher_layers)

        def formula(log_q: Tensor, log_p: Tensor) -> Tensor:
            return missing(log_q, log_p)

        made = {"objectives": missing, "divergences": formula, "layer_maps": layer_map, "projectors": nn.Linear}
        kinds: dict[str, dict[str, Any]] = {}
        for kind, name, _ in custom_names(mapping):
            kinds.setdefault(kind, {})[name] = made[kind]
        return cls(**kinds)

    def divergence(self, name: str) -> DivergenceFormula:
        """Return the formula of a divergence. Raises UsageError if its function takes no `log_q` and `log_p`."""
        passed = self.divergences[name]
        return passed if isinstance(passed, DivergenceFormula) else DivergenceFormula(name=name, values=passed)

    def problems(self, mapping: MappingFile) -> list[Problem]:
        """Return a problem for each name in a mapping file under which nothing was passed."""
        return [
            Problem(
                (*place, "name"),
                f"no object named '{name}' was passed, and a mapping file cannot name code. Passed as {kind}: "
                f"{', '.join(getattr(self, kind)) or 'none'}. Pass it from Python: "
                f"xkd.plan(mapping, {kind}={{'{name}': …}}).{suggest(name, getattr(self, kind))}",
            )
            for kind, name, place in custom_names(mapping)
            if name not in getattr(self, kind)
        ]

    def warnings(self, mapping: MappingFile) -> list[str]:
        """Return a warning for each object that a mapping file does not refer to."""
        used = {(kind, name) for kind, name, _ in custom_names(mapping)}
        return [
            f"{kind}: '{name}' was passed, and the mapping file does not refer to it"
            for kind, name, _ in self._all()
            if (kind, name) not in used
        ]

    def qualified_names(self) -> dict[str, dict[str, str]]:
        """Return module and qualified name of each object, or of its class, by kind and name, for a fingerprint."""
        found: dict[str, dict[str, str]] = {}
        for kind, name, passed in self._all():
            owner = passed.values if isinstance(passed, DivergenceFormula) else passed
            owner = owner if hasattr(owner, "__qualname__") else type(owner)
            found.setdefault(kind, {})[name] = f"{owner.__module__}.{owner.__qualname__}"
        return found

    def _all(self) -> Iterator[tuple[str, str, Any]]:
        for kind in ("objectives", "divergences", "layer_maps", "projectors"):
            for name, passed in getattr(self, kind).items():
                yield kind, name, passed


def custom_names(mapping: MappingFile) -> Iterator[tuple[str, str, YamlPath]]:
    """Yield (kind, name, place) of everything in a mapping file that is passed from Python."""
    for index, stage in enumerate(mapping.stages):
        for position, align in enumerate(stage.align):
            place: YamlPath = ("stages", index, "align", position)
            if isinstance(align.layers, CustomStrategy):
                yield "layer_maps", align.layers.name, (*place, "layers")
            if isinstance(align.loss, CustomLossOptions):
                yield "objectives", align.loss.name, (*place, "loss")
            if isinstance(align.projector, CustomProjectorOptions):
                yield "projectors", align.projector.name, (*place, "projector")
        if stage.tokens is not None and isinstance(stage.tokens.divergence, CustomDivergenceOptions):
            yield "divergences", stage.tokens.divergence.name, ("stages", index, "tokens", "divergence")
