"""Choice of a conversion's layers by measurement: made once, kept in the run folder, compared on other text."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xarch_kd.calibration.aligned_mixers import align_mixers, mixer_weights
from xarch_kd.calibration.sensitivity import MeasuredText, measured_text, mixer_pool, scored_layers
from xarch_kd.calibration.substitution import Effect, SubstitutedTeacher
from xarch_kd.data.batches import Batch
from xarch_kd.data.rows import Rows, rows_of_tokens, select_rows
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.evaluation.statistics import paired_bootstrap
from xarch_kd.files import read_tensors, write_json, write_tensors
from xarch_kd.job.fingerprint import mapping_fingerprint
from xarch_kd.job.models import device_of, load_teacher
from xarch_kd.job.texts import RunText, named_hashes
from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.schema import ConversionOptions
from xarch_kd.planning.layer_choice import (
    ComparedSet,
    Key,
    LayerSelection,
    guards,
    kept_count,
    random_kept,
    uniform_kept,
)
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.render_selection import difference_text
from xarch_kd.planning.resolve import selected_plan
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import Layout, layout_of

RANDOM_SETS: Final = 3
# Name of the mean over the random sets.
RANDOM: Final = "random, mean"
# File beside the selection with the mixers that were aligned for it.
MIXERS: Final = "selection-mixers.safetensors"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The plan with the layers that its strategy chose, and what else is known since.

    `teacher` is the teacher if it was loaded for the choice, `mixers` the weights of new mixers that were aligned.
    """

    plan: Plan
    teacher: PreTrainedModel | None = None
    mixers: Mapping[str, Tensor] | None = None


def select_layers(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, text: RunText, reporter: Reporter, *, kept: Path | None = None
) -> Chosen:
    """Return the plan with the layers that its strategy chooses.

    The choice is read from the file `kept` if it exists, and is written there otherwise, beside the mixers that were
    aligned for it. Raises CheckpointError for a file of another mapping file, DataError for text that the student is
    evaluated on too, or too little of it.
    """
    if not plan.is_unselected:
        return Chosen(plan=plan)
    if kept is not None and kept.exists():
        selection = read_selection(kept, plan)
        mixers = _read_mixers(kept, selection) if selection.aligned_steps else None
        return Chosen(plan=selected_plan(plan, selection), mixers=mixers)
    texts = _texts(plan, tokenizer, text, reporter)
    teacher = load_teacher(plan, reporter)
    selection, mixers = _measured(plan, teacher, texts, text.training, reporter)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if mixers is not None:
            write_tensors(kept.with_name(MIXERS), mixers, {"made_for": selection.made_for})
        # Last: where it is, the mixers are.
        write_json(kept, selection.as_dict())
    for line in selection_lines(selection):
        reporter.line(line)
    return Chosen(plan=selected_plan(plan, selection), teacher=teacher, mixers=mixers)


def _read_mixers(kept: Path, selection: LayerSelection) -> Mapping[str, Tensor]:
    """Return the aligned mixers beside a selection. Raises CheckpointError if they are damaged or of another one."""
    mixers, described = read_tensors(kept.with_name(MIXERS))
    if described.get("made_for") != selection.made_for:
        raise CheckpointError(
            f"{MIXERS} is not of this mapping file.",
            fix=f"delete it and {kept.name}, and run again with --resume: the layers are then chosen again",
        )
    return mixers


def read_selection(path: Path, plan: Plan) -> LayerSelection:
    """Return the selection in a file. Raises CheckpointError if it is damaged or of another mapping file."""
    fix = "restore it from a copy, or delete it and run again with --resume: the layers are then chosen again"
    try:
        selection = LayerSelection.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, CheckpointError) as error:
        found = error.found if isinstance(error, CheckpointError) else error
        raise CheckpointError(f"{path.name} is damaged.", asked=path, found=found, fix=fix) from None
    layers = len(plan.teacher.layers)
    _, strategy, key = _asked(plan)
    wanted = kept_count(strategy, key, layers)
    fits = len(set(selection.kept)) == len(selection.kept) == wanted and set(selection.kept) <= set(range(layers))
    if selection.made_for != mapping_fingerprint(plan) or not fits:
        raise CheckpointError(
            f"{path.name} is not of this mapping file.",
            asked=f"mapping {mapping_fingerprint(plan)[:12]}, {wanted} of {layers} blocks keep attention",
            found=f"mapping {selection.made_for[:12]}, blocks {', '.join(map(str, selection.kept))}",
            fix=fix,
        )
    return selection


def selection_lines(selection: LayerSelection) -> list[str]:
    """Return the choice and its comparison with other sets, as lines to print."""
    aligned = f", with mixers of {selection.aligned_steps} steps" if selection.aligned_steps else ""
    lines = [
        f"layers chosen by {selection.strategy} ({selection.metric}) in {selection.seconds:.1f} s on "
        f"{selection.tokens:,} tokens{aligned}: attention is kept in {', '.join(map(str, selection.kept))}"
    ]
    state = "aligned" if selection.aligned_steps else "untrained"
    for one in selection.compared:
        difference = f", KL {difference_text(one)}" if one.difference is not None else ""
        lines.append(f"  on other text, {state}, {one.name}: KL {one.kl:.3f}, copying {one.copying:.2f}{difference}")
    uniform = next(one for one in selection.compared if one.name == "uniform")
    if uniform.kept != selection.kept and (uniform.low if uniform.low is not None else uniform.difference or 0) <= 0:
        lines.append(f"warning: on other text the chosen layers are not better than evenly spaced ones, {state}")
    return lines


def _measured(
    plan: Plan, teacher: PreTrainedModel, texts: tuple[MeasuredText, MeasuredText], training: Rows, reporter: Reporter
) -> tuple[LayerSelection, Mapping[str, Tensor] | None]:
    """Score each new mixer alone, choose the layers, and compare the choice with others on other text.

    With `aligned` the mixers are trained first, and those of the replaced layers are returned.
    """
    conversion, strategy, key = _asked(plan)
    own, other = texts
    began = time.perf_counter()
    teacher.to(device_of(plan)).eval()  # type: ignore[arg-type]  # stubs expect a bound method
    layout = layout_of(teacher, plan.mapping.teacher.paths)
    reporter.line("choosing layers: making a new mixer for every block")
    pool = mixer_pool(teacher, conversion, seed=plan.mapping.seed)
    steps = strategy.aligned_steps
    if steps:
        batches = _alignment_batches(plan, training, steps)
        align_mixers(layout, pool, batches, steps=steps, reporter=reporter)
    scored = scored_layers(_substituted(layout, pool, own), strategy, key, reporter=reporter)
    kept = tuple(score.layer for score in scored if score.kept)
    compared, copying = _compared(_substituted(layout, pool, other), other, kept, plan, reporter)
    mixers = mixer_weights(pool, _complement(kept, len(layout.blocks))) if steps else None
    teacher.cpu()
    selection = LayerSelection(
        strategy=strategy.strategy,
        metric=strategy.metric,
        kept=kept,
        layers=scored,
        compared=compared,
        tokens=own.tokens,
        seconds=round(time.perf_counter() - began, 2),
        teacher_copying=copying,
        made_for=mapping_fingerprint(plan),
        aligned_steps=steps,
    )
    return selection, mixers


def _alignment_batches(plan: Plan, training: Rows, steps: int) -> list[Batch]:
    """Return the batches that mixers are aligned on: none of the rows that choices are compared on."""
    _, strategy, _ = _asked(plan)
    size = plan.mapping.data.batch_size
    compared = min(rows_of_tokens(training, strategy.tokens // 2), len(training) // 2)
    count = max(1, min(steps * size, len(training) - compared))
    rows = select_rows(training, count, seed=_seed(plan))
    return list(rows.batches(size, origin="text to align mixers on"))


def _asked(plan: Plan) -> tuple[ConversionOptions, LayerStrategy, Key]:
    """Return the conversion of a mapping with a strategy, the strategy, and the key that has it."""
    conversion = plan.mapping.student.convert
    assert conversion is not None
    assert plan.models.strategy is not None
    return conversion, plan.models.strategy, conversion.selection_key


def _seed(plan: Plan) -> int:
    own = _asked(plan)[1].seed
    return plan.mapping.seed if own is None else own


def _texts(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, text: RunText, reporter: Reporter
) -> tuple[MeasuredText, MeasuredText]:
    """Return the text to choose on and the text to compare on. Raises DataError for text of the evaluation."""
    strategy = _asked(plan)[1]
    known = known_tokens(tokenizer, plan.teacher.vocabulary)
    positions = getattr(plan.models.teacher.config.get_text_config(), "max_position_embeddings", None)
    own, other = (
        measured_text(text.training, tokens, known, positions=positions, seed=_seed(plan), other=is_other)
        for tokens, is_other in ((strategy.tokens, False), (strategy.tokens // 2, True))
    )
    shared = (own.hashes | other.hashes) & named_hashes(plan, tokenizer, reporter, text)
    if shared:
        raise DataError(
            "The text that layers are chosen on is text that the student is evaluated on.",
            found=f"{len(shared):,} documents that layers would be chosen on are in evaluation text too",
            fix="name other text under data.evaluation and evaluate.also, give the strategy another seed, or choose "
            "the layers by a list or by strategy: uniform",
        )
    return own, other


def known_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Return the ids of a tokenizer that are not special and that a model with `rows` rows of embeddings has."""
    special = set(tokenizer.all_special_ids)
    return [index for index in range(min(len(tokenizer), rows)) if index not in special]


def _substituted(layout: Layout, pool: Mapping[int, Layout], text: MeasuredText) -> SubstitutedTeacher:
    return SubstitutedTeacher(layout, pool, text.text, text.compared, text.recall)


def _compared(
    substituted: SubstitutedTeacher,
    text: MeasuredText,
    kept: tuple[int, ...],
    plan: Plan,
    reporter: Reporter,
) -> tuple[tuple[ComparedSet, ...], float]:
    """Return the chosen set, an even one and random ones on other text, and the teacher's own share of copies."""
    _, strategy, key = _asked(plan)
    layers, seed = len(substituted.teacher.blocks), _seed(plan)
    sets = {"chosen": kept, "uniform": uniform_kept(layers, len(kept), *guards(strategy, key))}
    for number in range(RANDOM_SETS):
        sets[f"random {number + 1}"] = random_kept(strategy, key, layers, len(kept), seed + number)
    effects: dict[str, Effect] = {}
    with reporter.work("comparing choices of layers", len(sets), "sets") as work:
        for name, chosen in sets.items():
            effects[name] = substituted.effect(_complement(chosen, layers))
            work.advance()
    random = [effects[name] for name in sets if name.startswith("random")]
    found = [
        _against(name, chosen, effects[name].kl, effects[name].copying, effects["chosen"].kl, text.compared)
        for name, chosen in sets.items()
    ]
    kl = torch.stack([effect.kl for effect in random]).mean(0)
    copying = sum(effect.copying for effect in random) / len(random)
    found.append(_against(RANDOM, (), kl, copying, effects["chosen"].kl, text.compared))
    return tuple(found), substituted.own.copying


def _against(
    name: str, kept: tuple[int, ...], kl: Tensor, copying: float, chosen: Tensor, compared: Tensor
) -> ComparedSet:
    if kl is chosen:
        return ComparedSet(name=name, kept=kept, kl=float(kl.mean()), copying=copying)
    rows = [torch.full(compared.shape, torch.nan).masked_scatter(compared, values) for values in (chosen, kl)]
    difference = paired_bootstrap(*rows)
    return ComparedSet(
        name=name,
        kept=kept,
        kl=float(kl.mean()),
        copying=copying,
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
    )


def _complement(kept: Collection[int], layers: int) -> tuple[int, ...]:
    return tuple(index for index in range(layers) if index not in kept)
