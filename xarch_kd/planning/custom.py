"""Objects passed from Python, by the names under which a mapping file refers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import LayerMap


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

    `student` and `teacher` are log-probabilities [tokens, vocabulary] in float32 at the stage's temperature, of a few
    hundred tokens at a time. Returns one value per token, [tokens], in nats.
    """

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of each token, [tokens]."""
        ...


class CustomLayerMap(Protocol):
    """Layer map from the depths of both models.

    Returns a `LayerMap` or its weights [student layers, teacher layers]: non-negative, rows that sum to 1 or are 0.
    """

    def __call__(self, student_layers: int, teacher_layers: int) -> LayerMap | Tensor:
        """Return the layer map of two models with these numbers of layers."""
        ...


class CustomProjector(Protocol):
    """Factory of projectors, e.g. a module class: one module is built per pair, and trained and saved with the run.

    The module maps student features [..., student dim] to [..., teacher dim].
    """

    def __call__(self, student_dim: int, teacher_dim: int) -> nn.Module:
        """Return a module for these two dims."""
        ...


@dataclass(frozen=True, kw_only=True)
class CustomObjects:
    """The objects that a caller passed, by kind and name. Raises UsageError for one that cannot be called."""

    objectives: Mapping[str, CustomObjective] = field(default_factory=dict)
    divergences: Mapping[str, CustomDivergence] = field(default_factory=dict)
    layer_maps: Mapping[str, CustomLayerMap] = field(default_factory=dict)
    projectors: Mapping[str, CustomProjector] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, name, passed in self._all():
            if not callable(passed):
                raise UsageError(
                    f"An object of {kind}= cannot be called.",
                    asked=f"{kind}={{{name!r}: …}}",
                    found=type(passed).__name__,
                    allowed="a function or an object with __call__",
                )

    @classmethod
    def of(cls, **kinds: Mapping[str, Callable[..., Any]] | None) -> CustomObjects:
        """Return the objects by kind, where None stands for no object."""
        return cls(**{kind: dict(passed) for kind, passed in kinds.items() if passed is not None})

    def qualified_names(self) -> dict[str, dict[str, str]]:
        """Return module and qualified name of each object, or of its class, by kind and name, for a fingerprint."""
        found: dict[str, dict[str, str]] = {}
        for kind, name, passed in self._all():
            owner = passed if hasattr(passed, "__qualname__") else type(passed)
            found.setdefault(kind, {})[name] = f"{owner.__module__}.{owner.__qualname__}"
        return found

    def _all(self) -> Iterator[tuple[str, str, Any]]:
        for kind in ("objectives", "divergences", "layer_maps", "projectors"):
            for name, passed in getattr(self, kind).items():
                yield kind, name, passed
