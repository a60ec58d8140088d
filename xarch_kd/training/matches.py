"""One pair of a plan as it is computed: what it builds, what it is told by calibration text, and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from xarch_kd.errors import UsageError
from xarch_kd.losses.bridge import attention_bridge, queries_and_keys
from xarch_kd.losses.cka import cka_loss
from xarch_kd.losses.features import feature_loss, feature_normaliser
from xarch_kd.losses.mixing import mixing_loss
from xarch_kd.losses.relations import gram_loss, relation_loss
from xarch_kd.losses.standardise import FeatureStatistics, Standardiser
from xarch_kd.mapping_file.align_losses import AttentionBridge, MixingMatch, Relation
from xarch_kd.mapping_file.objectives import Align, is_standardised
from xarch_kd.mapping_file.plan import PairPlan
from xarch_kd.mixing import Mixing
from xarch_kd.projectors import HeadMap, Projector, build_projector
from xarch_kd.projectors.heads import assignment, head_costs, head_map
from xarch_kd.training.counts import Counts
from xarch_kd.training.features import Feature

# Random values that two mixers are applied to, to see which heads are alike: their products estimate those of matrices.
ASSIGNMENT_PROBES: Final = 16
TRAINING_PROBES: Final = 4
PROBE_SEED: Final = 20_260


class Projection(NamedTuple):
    """A projector by the key it is kept under, and what it maps to what: features [batch, time, width]."""

    key: str
    projector: Projector
    student: Tensor
    teacher: Tensor


class Match(ABC):
    """The objective of one pair.

    `modules` is where projectors and head maps are registered, so that pairs with one key share one. `fitted` are
    constants that calibration text gives, by name; `to_fit` names those that the match needs.
    """

    def __init__(self, pair: PairPlan, entry: Align, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        self.pair, self.entry = pair, entry
        self.fitted: dict[str, Tensor] = {}
        self.to_fit: tuple[str, ...] = ("mean", "deviation") if is_standardised(entry.loss) else ()
        self._teacher = FeatureStatistics()
        self.build(modules, generator)

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:  # noqa: B027  # most have nothing
        """Register what is trained beside the student."""

    @abstractmethod
    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, counts: Counts) -> Tensor:
        """Return the micro-batch's share of the pair's loss, before any weight."""

    def objective(self, student: Feature, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        """Return the objective of a map that is trained beside the student and changes nothing but that map."""
        return None

    def energy(self, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        """Return what this micro-batch adds to a divisor of the pair's own, if it has one."""
        return None

    def projections(self, student: Feature, teacher: Feature) -> Iterator[Projection]:
        """Yield the pair's projectors with what they map."""
        yield from ()

    def observe(self, student: Feature, teacher: Feature, skip: int) -> None:
        """Take in features of calibration text, whose first `skip` tokens are not typical."""
        if "mean" in self.to_fit:
            self._teacher.update(self.target(teacher)[:, skip:])

    def fit(self) -> None:
        """Set what is fitted from what was observed."""
        if "mean" in self.to_fit:
            standardiser = self._teacher.standardiser()
            self.fitted |= {"mean": standardiser.mean.float(), "deviation": standardiser.deviation.float()}

    def target(self, teacher: Feature) -> Tensor:
        """Return the teacher's features as they are compared."""
        target = tensor(teacher).float()
        return target if self.pair.teacher_scale == 1 else target * self.pair.teacher_scale

    def standardiser(self, like: Tensor) -> Standardiser | None:
        """Return the standardiser, if the loss has one. Raises UsageError when it was not fitted yet."""
        if "mean" not in self.to_fit:
            return None
        return Standardiser(self.constant("mean", like), self.constant("deviation", like))

    def constant(self, name: str, like: Tensor) -> Tensor:
        """Return a fitted constant. Raises UsageError when calibration text was not shown yet."""
        if name not in self.fitted:
            raise UsageError(
                f"The objective '{self.pair.name}' needs statistics of calibration text.",
                asked=name,
                found="none yet",
                fix="call xarch_kd.training.preparation.prepare(aligner, batches) before the first step",
            )
        return self.fitted[name].to(like.device)

    def _projector(
        self, modules: nn.ModuleDict, key: str, widths: tuple[int, int], generator: torch.Generator
    ) -> Projector | None:
        key = key.replace(".", "-")  # a ModuleDict's keys may not hold dots
        if key not in modules:
            options = {} if self.pair.projector == "none" else self.entry.projector_part.options()
            built = build_projector(self.pair.projector, *widths, generator=generator, **options)
            if built is None:
                return None
            modules[key] = built
        found = modules[key]
        assert isinstance(found, Projector)
        return found


class FeatureMatch(Match):
    """Features through a projector, perhaps standardised."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        pair = self.pair
        self.projector = self._projector(
            modules, pair.projector_key, (pair.student_width, pair.teacher_width), generator
        )

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, counts: Counts) -> Tensor:
        loss, target = self.entry.loss, self.target(teacher)
        return feature_loss(
            loss.kind,
            tensor(student).float(),
            target,
            normaliser=counts.energies[self.pair.name] if loss.kind == "relative_mse" else counts.tokens,
            mask=mask,
            projector=self.projector,
            standardiser=self.standardiser(target),
            epsilon=getattr(loss, "epsilon", 1e-6),
            delta=getattr(loss, "delta", 1.0),
        )

    def energy(self, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        if self.entry.loss.kind != "relative_mse":
            return None
        target = self.target(teacher)
        return feature_normaliser("relative_mse", target, mask, standardiser=self.standardiser(target))

    def projections(self, student: Feature, teacher: Feature) -> Iterator[Projection]:
        if self.projector is not None:
            yield Projection(self.pair.projector_key, self.projector, tensor(student), self.target(teacher))


class SimilarityMatch(Match):
    """Features compared by how tokens relate, without a projector."""

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, counts: Counts) -> Tensor:
        compare = cka_loss if self.entry.loss.kind == "cka" else gram_loss
        target = self.target(teacher)
        return compare(
            tensor(student).float(),
            target,
            normaliser=counts.tokens,
            mask=mask,
            standardiser=self.standardiser(target),
            shared_basis=self.pair.shared_basis,
        )


class RelationMatch(Match):
    """Relations of values, of queries or of keys."""

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, counts: Counts) -> Tensor:
        loss = self.entry.loss
        assert isinstance(loss, Relation)
        own, target = (self._heads(loss, feature).float() for feature in (student, teacher))
        return relation_loss(own, target, normaliser=counts.tokens, mask=mask, heads=loss.heads)

    def _heads(self, loss: Relation, feature: Feature) -> Tensor:
        if loss.of is None:
            return tensor(feature)
        query, key = queries_and_keys(mixing(feature))
        return query if loss.of == "queries" else key


class BridgeMatch(Match):
    """Queries and keys, each through a projector of its own."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        assert self.pair.bridge is not None
        self.keys = tuple(f"{self.pair.projector_key}-{side}" for side in ("query", "key"))
        self.maps = tuple(
            self._projector(modules, key, widths, generator)
            for key, widths in zip(self.keys, self.pair.bridge, strict=True)
        )

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, counts: Counts) -> Tensor:
        loss = self.entry.loss
        assert isinstance(loss, AttentionBridge)
        return attention_bridge(
            queries_and_keys(mixing(student)),
            queries_and_keys(mixing(teacher)),
            normaliser=counts.tokens,
            query_map=self.maps[0],
            key_map=self.maps[1],
            mask=mask,
            kind=loss.distance,
            epsilon=loss.epsilon,
            delta=loss.delta,
        )

    def projections(self, student: Feature, teacher: Feature) -> Iterator[Projection]:
        sides = zip(queries_and_keys(mixing(student)), queries_and_keys(mixing(teacher)), strict=True)
        for key, projector, (own, target) in zip(self.keys, self.maps, sides, strict=True):
            if projector is not None:
                yield Projection(key, projector, own.flatten(2), target.flatten(2))


class MixingDistanceMatch(Match):
    """The rows of two token-mixing matrices."""

    def build(self, modules: nn.ModuleDict, generator: torch.Generator) -> None:
        assert isinstance(self.entry.loss, MixingMatch)
        self.settings = self.entry.loss
        self.heads: HeadMap | None = None
        self._costs: list[Tensor] = []
        if self.settings.heads == "assignment":
            self.to_fit = ("heads",)
        if self.settings.heads == "learned":
            assert self.pair.student_heads is not None
            assert self.pair.teacher_heads is not None
            self.heads = HeadMap(self.pair.student_heads, self.pair.teacher_heads)
            modules[f"{self.pair.name}-heads".replace(".", "-")] = self.heads

    def loss(self, student: Feature, teacher: Feature, mask: Tensor | None, counts: Counts) -> Tensor:
        own, target = mixing(student), mixing(teacher)
        weights = self._weights(own, target)
        return mixing_loss(
            self.settings.distance,
            own,
            target,
            normaliser=counts.tokens,
            mask=mask,
            head_map=None if weights is None else weights.to(own.device),
            impl=self.settings.implementation,
            probes=self.settings.probes,
        )

    def objective(self, student: Feature, teacher: Feature, mask: Tensor | None) -> Tensor | None:
        if self.heads is None:
            return None
        return self.heads(*_probed(mixing(student), mixing(teacher), TRAINING_PROBES), mask)

    def observe(self, student: Feature, teacher: Feature, skip: int) -> None:
        if "heads" in self.to_fit:
            self._costs.append(head_costs(*_probed(mixing(student), mixing(teacher), ASSIGNMENT_PROBES)))

    def fit(self) -> None:
        if "heads" in self.to_fit:
            self.fitted["heads"] = assignment(torch.stack(self._costs).mean(0))

    def _weights(self, own: Mixing, target: Mixing) -> Tensor | None:
        if self.heads is not None:
            return self.heads.weights().detach()
        if self.settings.heads in ("assignment", "learned"):
            return self.constant("heads", torch.empty(0))
        return head_map(self.settings.heads, own.heads, target.heads)


MATCHES: Final[Mapping[str, Callable[..., Match]]] = {
    **dict.fromkeys(("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2"), FeatureMatch),
    **dict.fromkeys(("cka", "gram"), SimilarityMatch),
    "relation": RelationMatch,
    "attention_bridge": BridgeMatch,
    "mixing": MixingDistanceMatch,
}


def build_match(pair: PairPlan, entry: Align, modules: nn.ModuleDict, generator: torch.Generator) -> Match:
    """Return the match of a pair, whose modules are registered in `modules`, with random weights of `generator`."""
    return MATCHES[pair.loss](pair, entry, modules, generator)


def tensor(feature: Feature) -> Tensor:
    """Return a feature that is a tensor."""
    assert isinstance(feature, Tensor)
    return feature


def mixing(feature: Feature) -> Mixing:
    """Return a feature that is a mixing matrix."""
    assert isinstance(feature, Mixing)
    return feature


@torch.no_grad()
def _probed(student: Mixing, teacher: Mixing, probes: int) -> tuple[Tensor, Tensor]:
    """Return what both mixers make of the same random values: [batch, time, heads, probes] of each."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    made: list[Any] = []
    for side in (student, teacher):
        generator.manual_seed(PROBE_SEED)
        values = torch.randn(side.batch, side.time, 1, probes, generator=generator).to(side.device)
        made.append(side.apply(values.expand(-1, -1, side.heads, -1)))
    return made[0], made[1]
