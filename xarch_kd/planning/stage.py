"""One stage of a mapping file resolved against both models: pairs, what trains, bytes, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xarch_kd.errors import TapError, UsageError
from xarch_kd.mapping_file.schema import Data, Stage
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.planning.block_inputs import block_input, runs_mixers_alone
from xarch_kd.planning.cost import BYTES, Rates, StageWork, stage_cost
from xarch_kd.planning.low_rank import LoraPlan, lora_plan, lora_problems
from xarch_kd.planning.mixing_sizes import mixing_size
from xarch_kd.planning.models import ModelHandle, ModelPair
from xarch_kd.planning.objective_checks import batch_warnings, objective_problems, redraw_warnings
from xarch_kd.planning.optimizers import optimizer_problems
from xarch_kd.planning.pairs import align_pairs
from xarch_kd.planning.plan import PairPlan, StagePlan
from xarch_kd.planning.prefix_checks import prefix_problems, prefix_warnings
from xarch_kd.planning.problems import Diagnostics, one_line
from xarch_kd.taps.layout import trainable_names
from xarch_kd.taps.sites import Site


def stage_plan(
    index: int,
    stage: Stage,
    data: Data,
    models: ModelPair,
    rates: Rates,
    diagnostics: Diagnostics,
    *,
    shared: int | None = None,
) -> StagePlan | None:
    """Return the stage resolved, or None if it is invalid, with the reason in `diagnostics`.

    `shared` is the number of batches that earlier stages have put into a cache shared with this one, None without one.
    """
    place: YamlPath = ("stages", index)
    known = len(diagnostics.problems)
    trainable = _trainable(stage, models, place, diagnostics)
    lora = None if stage.lora is None else lora_plan(stage.lora, models.student.layout, models.replaced, models.frozen)
    diagnostics.problems += lora_problems(stage, lora, place)
    reachable = {*trainable, *(() if lora is None else lora.weights)}
    _check_inputs(stage, models, place, diagnostics)
    entries = {
        align.name: align_pairs(align, stage, models, (*place, "align", position), diagnostics)
        for position, align in enumerate(stage.align)
    }
    pairs = tuple(pair for found, _ in entries.values() for pair in found)
    if len(diagnostics.problems) > known:
        return None
    pairs = _reached_pairs(stage, pairs, reachable, models, diagnostics)
    if not pairs and stage.tokens is None:
        diagnostics.problems.append(
            Problem((*place, "train"), "nothing that trains here reaches any objective of this stage")
        )
        return None
    _note_unreached(stage, pairs, reachable, models, diagnostics)
    rows = stage.batch_size or data.batch_size
    diagnostics.problems += [
        *objective_problems(stage, pairs, place),
        *prefix_problems(stage, data, models, place),
    ]
    if stage.evaluation is not None and data.evaluation is None and data.held_out_share == 0:
        message = "needs held-out text, and data.held_out is 0. Raise it, or name other text under data.evaluation."
        diagnostics.problems.append(Problem((*place, "evaluation"), message, on="key"))
    if diagnostics.for_training:
        diagnostics.problems += optimizer_problems(stage, (*place, "optimizer"))
    diagnostics.warnings += [
        *batch_warnings(stage, pairs, rows * data.sequence_length),
        *redraw_warnings(stage),
        *prefix_warnings(stage, data, stage.steps or 1),
    ]
    if len(diagnostics.problems) > known:
        return None
    resolved = _Resolved(
        index=index,
        stage=stage,
        rows=rows,
        length=data.sequence_length,
        pairs=pairs,
        trainable=trainable,
        lora=lora,
        shared=shared if stage.cache_place != "off" else None,
        layer_map_plots=tuple((name, found.text_plot()) for name, (_, found) in entries.items() if found is not None),
    )
    return _measured(resolved, models, rates, diagnostics)


@dataclass(frozen=True, kw_only=True)
class _Resolved:
    """A stage whose parts fit, before its costs are estimated."""

    index: int
    stage: Stage
    rows: int
    length: int
    pairs: tuple[PairPlan, ...]
    trainable: tuple[str, ...]
    layer_map_plots: tuple[tuple[str, str], ...]
    shared: int | None
    lora: LoraPlan | None

    @property
    def micro_batches(self) -> int:
        # Of one step, if the number of steps is not known yet.
        return (self.stage.steps or 1) * self.stage.gradient_accumulation

    @property
    def distinct(self) -> int:
        return min(self.stage.batches or self.micro_batches, self.micro_batches)

    @property
    def is_cached(self) -> bool:
        return self.stage.cache_place != "off"

    def cache_bytes(self, teacher: ModelHandle) -> int:
        """Return the bytes of the teacher's features at all sites, over all distinct batches."""
        token = (
            sum(numbers_per_token(site, teacher) for site in teacher_sites(self.stage, self.pairs))
            * BYTES[teacher.dtype]
        )
        return self.distinct * self.rows * self.length * token if self.is_cached else 0


def _measured(resolved: _Resolved, models: ModelPair, rates: Rates, diagnostics: Diagnostics) -> StagePlan | None:
    """Return the stage with its sizes and costs, or None if its cache does not fit."""
    work = _work(resolved, models)
    if not _cache_fits(resolved, work.cache_bytes, diagnostics):
        return None
    cost = stage_cost(work, models.teacher, models.student, rates)
    student = models.student
    tokens_per_step = resolved.rows * resolved.length * resolved.stage.gradient_accumulation
    return StagePlan(
        index=resolved.index,
        stage=resolved.stage,
        pairs=resolved.pairs,
        layer_map_plots=resolved.layer_map_plots,
        trainable=resolved.trainable,
        mixers=_mixers(resolved, models, diagnostics),
        trainable_parameters=sum(
            parameter.numel()
            for parameter in student.layout.model.parameters()
            if student.names[id(parameter)] in work.trainable
        )
        + work.adapter_parameters,
        lora=resolved.lora,
        projector_parameters=work.projector_parameters,
        batch_size=resolved.rows,
        distinct_batches=resolved.distinct,
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * (resolved.stage.steps or 1),
        cache_bytes=work.cache_bytes,
        flops=cost.flops,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
    )


def _work(resolved: _Resolved, models: ModelPair) -> StageWork:
    stage, pairs, lora = resolved.stage, resolved.pairs, resolved.lora
    sites = teacher_sites(stage, pairs)
    return StageWork(
        stage=stage,
        rows=resolved.rows,
        time=resolved.length,
        teacher_blocks=max((_blocks_run(site, models.teacher.depth) for site in sites), default=0),
        teacher_passes=(
            max(0, resolved.distinct - (resolved.shared or 0)) if resolved.is_cached else resolved.micro_batches
        ),
        student_blocks=_student_blocks(stage, pairs, models.student.depth),
        mixers_alone=runs_mixers_alone(stage, (pair.tap for pair in pairs)),
        student_passes=resolved.micro_batches,
        trainable=frozenset(resolved.trainable),
        adapted=frozenset(() if lora is None else lora.weights),
        adapter_parameters=0 if lora is None else lora.parameters,
        projector_parameters=sum(pair.projector_parameters for pair in pairs),
        cache_bytes=resolved.cache_bytes(models.teacher),
        mixing_products=sum(_mixing_products(pair, resolved.length, models) for pair in pairs),
    )


def numbers_per_token(site: Site, side: ModelHandle) -> int:
    """Return the numbers per token of the features of a site."""
    tap, layer = site
    size = mixing_size(side.layout, layer) if tap == "mixing" and layer is not None else None
    return side.layout.dim if size is None else size.numbers


def _mixing_products(pair: PairPlan, length: int, models: ModelPair) -> float:
    """Return the FLOPs per token of the loss on two mixing matrices, of which the causal halves are computed."""
    if pair.tap != "mixing" or pair.student_layer is None or pair.teacher_layer is None:
        return 0.0
    own = mixing_size(models.student.layout, pair.student_layer)
    other = mixing_size(models.teacher.layout, pair.teacher_layer)
    return float(length * sum(times * size.heads * size.head_dim for times, size in ((3, own), (1, other)) if size))


def _trainable(stage: Stage, models: ModelPair, place: YamlPath, diagnostics: Diagnostics) -> tuple[str, ...]:
    layout = models.student.layout
    try:
        names = trainable_names(layout.model, layout, stage.parts, models.replaced or None)
    except (UsageError, TapError) as error:
        diagnostics.problems.append(Problem((*place, "train"), one_line(error)))
        return ()
    return tuple(name for name in names if name not in models.frozen)


def _mixers(resolved: _Resolved, models: ModelPair, diagnostics: Diagnostics) -> tuple[str, ...]:
    """Return the trainable parameters that use `mixer_lr`: of the replaced mixers, or of all if none was replaced."""
    if resolved.stage.optimizer.mixer_lr is None:
        return ()
    layout = models.student.layout
    mixers = set(trainable_names(layout.model, layout, ("mixers",), models.replaced or None))
    names = tuple(name for name in resolved.trainable if name in mixers)
    if not names:
        diagnostics.warnings.append(f"stage {resolved.stage.name}: mixer_lr is not used, since no mixer trains")
    return names


def _check_inputs(stage: Stage, models: ModelPair, place: YamlPath, diagnostics: Diagnostics) -> None:
    if stage.inputs == "student":
        return
    teacher, student = models.teacher.layout.dim, models.student.layout.dim
    if teacher != student:
        message = (
            f"inputs: teacher feeds the student's blocks what the teacher's were fed, so both must be equally wide; "
            f"the teacher is {teacher} wide, the student {student}. Use inputs: student."
        )
        diagnostics.problems.append(Problem((*place, "inputs"), message))
    if stage.tokens is not None:
        message = (
            "with inputs: teacher each block runs on its own, so there are no next-token distributions. "
            "Use inputs: student, or a stage of its own."
        )
        diagnostics.problems.append(Problem((*place, "tokens"), message, on="key"))


def _reached_pairs(
    stage: Stage, pairs: tuple[PairPlan, ...], trainable: set[str], models: ModelPair, diagnostics: Diagnostics
) -> tuple[PairPlan, ...]:
    """Leave out pairs without a trained parameter: they would cost time and be constants of the loss."""
    kept = [pair for pair in pairs if _reach(stage, pair, models) & trainable]
    for align in stage.align:
        without = [pair.student_layer for pair in pairs if pair.align == align.name and pair not in kept]
        if without:
            blocks = ", ".join(str(layer) for layer in without if layer is not None)
            where = f" of blocks {blocks}" if blocks else ""
            diagnostics.warnings.append(
                f"stage {stage.name}: {align.name}{where} is left out, because nothing that trains reaches it"
            )
    return tuple(kept)


def _note_unreached(
    stage: Stage, pairs: Sequence[PairPlan], trainable: set[str], models: ModelPair, diagnostics: Diagnostics
) -> None:
    if stage.tokens is not None:
        return
    reached = {name for pair in pairs for name in _reach(stage, pair, models)}
    left = sorted(trainable - reached)
    if left:
        diagnostics.warnings.append(
            f"stage {stage.name}: {len(left)} of {len(trainable)} parameter tensors that it trains are reached by no "
            f"objective and stay as they are, e.g. {left[0]}"
        )


def _reach(stage: Stage, pair: PairPlan, models: ModelPair) -> set[str]:
    return models.student.reached(pair.tap, pair.student_layer, alone=stage.inputs == "teacher")


def teacher_sites(stage: Stage, pairs: Sequence[PairPlan]) -> tuple[Site, ...]:
    """Return the teacher's sites that are read: targets, and inputs of the student's blocks or mixers."""
    sites = {Site(pair.tap, pair.teacher_layer): None for pair in pairs}
    for pair in pairs if stage.inputs == "teacher" else ():
        taps = [other.tap for other in pairs if other.student_layer == pair.student_layer]
        sites[block_input(stage, taps, pair.teacher_layer)] = None
    if stage.tokens is not None:
        sites[Site("head_input", None)] = None
    return tuple(sites)


def _blocks_run(site: Site, depth: int) -> int:
    """Return the number of blocks that a pass runs to reach a site."""
    tap, layer = site
    if tap == "embedding":
        return 0
    return depth if layer is None else layer + 1


def _student_blocks(stage: Stage, pairs: Sequence[PairPlan], depth: int) -> tuple[int, ...]:
    if stage.inputs == "teacher":
        return tuple(sorted({pair.student_layer for pair in pairs if pair.student_layer is not None}))
    if stage.tokens is not None:
        return tuple(range(depth))
    return tuple(range(max(_blocks_run(Site(pair.tap, pair.student_layer), depth) for pair in pairs)))


def _cache_fits(resolved: _Resolved, needed: int, diagnostics: Diagnostics) -> bool:
    stage, distinct = resolved.stage, resolved.distinct
    if needed == 0:
        return True
    if resolved.stage.steps is None:
        diagnostics.warnings.append(
            f"stage {stage.name}: the size of its cache depends on the text, so its limit is checked when that was read"
        )
    elif distinct == resolved.micro_batches and resolved.shared is None:
        diagnostics.warnings.append(
            f"stage {stage.name}: every batch is drawn once, so the cache is never read; give fewer batches "
            "than steps, or cache: off"
        )
    if needed <= stage.cache_limit:
        return True
    fitting = stage.cache_limit * distinct // needed
    message = (
        f"the teacher's features need {needed / 2**30:.1f} GiB for {distinct} batches, more than the limit of "
        f"{stage.cache_limit / 2**30:.1f} GiB. "
        f"Allow it (cache: {{where: {stage.cache_place}, limit_gib: {-(-needed // 2**30)}}}), draw "
        f"{f'batches: {fitting} at most' if fitting else 'smaller batches'}, or turn the cache off."
    )
    diagnostics.problems.append(Problem(("stages", resolved.index, "cache"), message))
    return False
