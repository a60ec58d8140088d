"""Pairs of one `align` entry: layers, projector, and checks of both models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from xarch_kd.errors import TapError, UsageError, check_table
from xarch_kd.layer_mapping import LayerMap
from xarch_kd.losses.relations import relation_heads
from xarch_kd.mapping_file.losses import AttentionBridge, MixingMatch, Relation
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.mapping_file.projectors import PROJECTOR_OPTIONS, CustomProjectorOptions, ProjectorName
from xarch_kd.mapping_file.scalars import kinds_of
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.planning.layer_maps import is_learned, layer_map, strategy_of
from xarch_kd.planning.mixing_sizes import MixingSize, mixing_size
from xarch_kd.planning.models import ModelPair
from xarch_kd.planning.plan import PairPlan
from xarch_kd.planning.problems import Diagnostics, one_line
from xarch_kd.projectors import PROJECTOR_KINDS, build_custom_projector, enough_tokens, parameter_count, resolve_init
from xarch_kd.projectors.heads import head_map
from xarch_kd.taps.sites import MIXING_TAPS, WHOLE_TAPS, sites_of

# An identity is what `none` means where both have the same dimension.
check_table(
    "projectors",
    {*PROJECTOR_KINDS, "auto", "custom"} - {"identity"},
    {*get_args(ProjectorName), *kinds_of(PROJECTOR_OPTIONS)},
)
AlignPairs = tuple[list[PairPlan], LayerMap | None]


def align_pairs(align: Align, stage: Stage, models: ModelPair, place: YamlPath, diagnostics: Diagnostics) -> AlignPairs:
    """Return the pairs of one `align` entry and its layer map; problems are added to `diagnostics`."""
    source = _Source(align, models, place, diagnostics)
    if align.tap in WHOLE_TAPS:
        if stage.inputs == "teacher":
            message = f"inputs: teacher runs single blocks, which have no {align.tap}. Use a tap of blocks."
            diagnostics.problems.append(Problem((*place, "tap"), message))
        if align.layers is not None:
            message = f"the tap {align.tap} is one for the whole model, so it has no layers. Leave this key out."
            diagnostics.problems.append(Problem((*place, "layers"), message, on="key"))
        return [source.pair(align.name, None, None)], None
    known = len(diagnostics.problems)
    _check_tap(align, models, place, diagnostics)
    found = layer_map(align, models, place, diagnostics)
    if found is None or len(diagnostics.problems) > known:
        return [], found
    if is_learned(align) and stage.inputs == "teacher":
        message = (
            "a learned map compares each student block with every teacher block, and inputs: teacher feeds it what one "
            "of them was fed. Use inputs: student, or another strategy."
        )
        diagnostics.problems.append(Problem((*place, "layers"), message))
    return list(_counted_once(source.layer_pairs(found))), found


def _check_tap(align: Align, models: ModelPair, place: YamlPath, diagnostics: Diagnostics) -> None:
    for side, name in ((models.teacher, "teacher"), (models.student, "student")):
        if align.tap == "mlp_output" and side.layout.mlp_outputs is None:
            message = f"the {name} is a {side.config.model_type}, whose blocks have no MLP that is known"
            diagnostics.problems.append(Problem((*place, "tap"), message))


def _counted_once(pairs: Iterator[PairPlan]) -> Iterator[PairPlan]:
    """Yield the pairs; of those that share a projector only the first counts its parameters."""
    seen: set[str] = set()
    for pair in pairs:
        yield replace(pair, projector_parameters=0) if pair.projector_key in seen else pair
        seen.add(pair.projector_key)


@dataclass(frozen=True)
class _Source:
    """Source of the pairs of an entry."""

    align: Align
    models: ModelPair
    place: YamlPath
    diagnostics: Diagnostics

    def layer_pairs(self, found: LayerMap) -> Iterator[PairPlan]:
        """Yield the pairs of a layer map."""
        layers = found.pairs()
        students = [student for student, _, _ in layers]
        for student, teacher, share in layers:
            name = f"{self.align.name}.{student}" + (f"-{teacher}" if students.count(student) > 1 else "")
            pair = self.pair(name, student, teacher)
            yield replace(pair, weight=pair.weight * share, teacher_scale=self._teacher_scale(students.count(student)))

    def _teacher_scale(self, span: int) -> float:
        """Return the factor of the teacher's features.

        The outputs of mixers and MLPs add up in the residual stream, so a student block that stands for a span of
        teacher blocks learns their sum. Of squared errors, the mean over the span of those to span × each has its
        gradient.
        """
        if self.align.tap not in ("mixer_output", "mlp_output") or isinstance(self.align.layers, tuple):
            return 1.0
        return float(span) if strategy_of(self.align)[0] == "block_average" else 1.0

    def pair(self, name: str, student_layer: int | None, teacher_layer: int | None) -> PairPlan:
        """Return a pair with the sizes of both models; problems are added to the diagnostics."""
        align, student, teacher = self.align, self.models.student, self.models.teacher
        pair = PairPlan(
            name=name,
            align=align.name,
            tap=align.tap,
            student_layer=student_layer,
            teacher_layer=teacher_layer,
            student_dim=student.layout.dim,
            teacher_dim=teacher.layout.dim,
            projector="none",
            projector_parameters=0,
            loss=align.loss.kind,
            weight=align.weight,
            projector_key=self._projector_key(name, student_layer),
            shared_basis=self.models.inherits and student.layout.dim == teacher.layout.dim,
        )
        if align.tap in MIXING_TAPS and student_layer is not None and teacher_layer is not None:
            return self._of_factors(pair, student_layer, teacher_layer)
        if not align.loss.takes_projector(align.tap):
            return pair
        return self._projected(pair, ((pair.student_dim, pair.teacher_dim),))

    def _projector_key(self, name: str, student_layer: int | None) -> str:
        if self.align.projector_part.share:
            return self.align.name
        return f"{self.align.name}.{student_layer}" if is_learned(self.align) else name

    def _projected(self, pair: PairPlan, dims: tuple[tuple[int, int], ...]) -> PairPlan:
        """Return the pair with a projector, one for each of these (student, teacher) dims."""
        part = self.align.projector_part
        unequal = next((pair for pair in dims if pair[0] != pair[1]), None)
        if part.kind == "none" and unequal is not None:
            self._problem(
                f"the student is {unequal[0]} wide and the teacher {unequal[1]}, so a projector is needed. "
                "Use auto or linear.",
                "projector",
            )
            return pair
        # A fresh student's dimensions are its own, even if there are as many.
        automatic = "none" if unequal is None and not self.models.fresh else "linear"
        kind = automatic if part.kind == "auto" else part.kind
        # What `auto` left out has nothing that options could be options of.
        options = {} if (part.kind, kind) == ("auto", "none") else part.options()
        try:
            for student, _ in dims:
                self._check_start(kind, student)
            parameters = sum(self._parameters(kind, *both, **options) for both in dims)
        except UsageError as error:
            self._problem(one_line(error), "projector")
            return pair
        return replace(pair, projector=kind, projector_parameters=parameters)

    def _parameters(self, kind: str, student_dim: int, teacher_dim: int, **options: Any) -> int:
        part = self.align.projector_part
        if not isinstance(part, CustomProjectorOptions):
            return parameter_count(kind, student_dim, teacher_dim, **options)
        factory = self.models.custom.projectors[part.name]
        built = build_custom_projector(part.name, factory, student_dim, teacher_dim, seed=0)
        return sum(parameter.numel() for parameter in built.parameters())

    def _check_start(self, kind: str, student_dim: int) -> None:
        """Add a problem if the calibration pass has too few tokens for an explicitly requested closed form."""
        how = self.align.projector_part.init
        form = resolve_init(how, kind)
        if how in ("auto", "random") or form == "random":
            return
        tokens, enough = self.models.calibration, enough_tokens(student_dim)
        if tokens <= student_dim:
            self._problem(
                f"{form} is fitted to more tokens than the student is wide: calibration.tokens is {tokens}, "
                f"at least {student_dim + 1} are needed and {enough} are recommended. Raise it, or use init: random.",
                "projector",
            )
        elif tokens < enough:
            self.diagnostics.warnings.append(
                f"{self.align.name}: {form} is fitted to {tokens} tokens in {student_dim} dimensions and follows the "
                f"tokens as much as the layers; calibration.tokens of {enough} or more is better"
            )

    def _of_factors(self, pair: PairPlan, student_layer: int, teacher_layer: int) -> PairPlan:
        """Return a pair of mixing matrices, of what they are made of, or of what they are applied to."""
        sides = ((self.models.student, student_layer), (self.models.teacher, teacher_layer))
        for side, layer in sides:
            try:
                sites_of(side.layout, {pair.tap: [layer]})
            except TapError as error:
                self._problem(f"block {layer} of {side.reference}: {one_line(error)}", "tap")
                return pair
        own, other = (mixing_size(side.layout, layer) for side, layer in sides)
        if own is not None and other is not None:
            pair = replace(pair, student_heads=own.heads, teacher_heads=other.heads)
        loss = self.align.loss
        if isinstance(loss, MixingMatch):
            self._check_mixing(loss, pair)
        elif isinstance(loss, AttentionBridge):
            pair = self._bridged(pair, own, other)
        elif isinstance(loss, Relation):
            self._check_relation(loss, own, other)
        return pair

    def _check_mixing(self, loss: MixingMatch, pair: PairPlan) -> None:
        layers = pair.student_layer or 0, pair.teacher_layer or 0
        sides = (self.models.student, self.models.teacher)
        kinds = tuple(side.layout.mixer_kinds[layer] for side, layer in zip(sides, layers, strict=True))
        if loss.distance in ("kl", "cross_entropy") and kinds != ("attention", "attention"):
            self._problem(
                f"{loss.distance} compares rows that are distributions, and block {layers[0]} of the student "
                f"({kinds[0]}) and block {layers[1]} of the teacher ({kinds[1]}) are not both attention. "
                "Use cosine, frobenius or relative_frobenius.",
                "loss",
                "distance",
            )
        if loss.impl == "sketch" and loss.distance != "frobenius":
            self._problem(
                "impl: sketch estimates distance: frobenius alone. Use it, or another impl.",
                "loss",
                "impl",
            )
        if loss.heads in ("assignment", "learned"):
            if loss.heads == "learned" and (pair.student_heads is None or pair.teacher_heads is None):
                self._problem(
                    f"the heads of these mixers ({kinds[0]}, {kinds[1]}) are not in their configs, and a learned "
                    "map is made before they run. Use heads: assignment, or weights.",
                    "loss",
                    "heads",
                )
            return
        if pair.student_heads is not None and pair.teacher_heads is not None:
            try:
                head_map(loss.heads, pair.student_heads, pair.teacher_heads)
            except UsageError as error:
                self._problem(one_line(error), "loss", *(("heads",) if "heads" in loss.model_fields_set else ()))

    def _bridged(self, pair: PairPlan, own: MixingSize | None, other: MixingSize | None) -> PairPlan:
        if own is None or other is None:
            self._problem(
                "an attention bridge needs mixers whose queries and keys (or C and B) are defined by the config: "
                "attention, mamba, mamba2 or gated_delta.",
                "loss",
                "kind",
            )
            return pair
        dims = ((own.query, other.query), (own.key, other.key))
        return replace(self._projected(pair, dims), bridge=dims)

    def _check_relation(self, loss: Relation, own: MixingSize | None, other: MixingSize | None) -> None:
        if loss.of is None or own is None or other is None:
            return
        dims = (own.query, other.query) if loss.of == "queries" else (own.key, other.key)
        try:
            relation_heads(*dims, loss.heads)
        except UsageError as error:
            self._problem(one_line(error), "loss", "heads")

    def _problem(self, message: str, *keys: str) -> None:
        self.diagnostics.add(Problem((*self.place, *keys), message))
