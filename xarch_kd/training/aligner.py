"""Module that a stage trains: student, projectors, and the objectives between student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, NonFiniteLoss, UsageError
from xarch_kd.files import read_tensors
from xarch_kd.layer_mapping.layer_map import LayerMap
from xarch_kd.objectives.alignment import ActivePair, Alignment, name_nonfinite
from xarch_kd.objectives.next_token import HEAD_INPUT, NextTokenObjective
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.ops import checks
from xarch_kd.planning.plan import PairPlan, Plan
from xarch_kd.taps.layout import Layout, layout_of
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import Feature, Features, of_other_rows
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.training.isolation import splitting_reason
from xarch_kd.training.loss_balancing import TOKENS, balance_of, read_balance, require_balanced
from xarch_kd.training.low_rank import Adapters
from xarch_kd.training.stage_setup import freeze_others, set_checkpointing, stage_of
from xarch_kd.training.student_features import block_input_site, replayed, traced
from xarch_kd.training.token_counts import counts_of, make_indices_known, shares_of


@dataclass(frozen=True, kw_only=True)
class AlignerOutput:
    """`loss` has the gradient; `parts` are its weighted terms by objective, detached."""

    loss: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepTargets:
    """Active pairs of one step, and the teacher's sites that they read. `progress` is the share of steps done."""

    step: int
    progress: float
    pairs: tuple[ActivePair, ...]
    sites: tuple[Site, ...]


class Aligner(nn.Module):
    """One stage of a plan as a module: student and projectors are inside it, the frozen teacher is not.

    `teacher` and `student` are models of the plan's configs. Parameters outside the stage's `train` are frozen here.
    For one's own loop: `Aligner(plan, teacher=…, student=…)(input_ids=…, step=…).loss.backward()`; a stage with closed
    forms or statistics of calibration text is made ready by `xarch_kd.calibration.initialize.prepare`.

    >>> import xarch_kd as xkd
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> teacher = AutoModelForCausalLM.from_pretrained("teacher")
    >>> student = xkd.convert(teacher, mixer="mamba2", replace=[1])
    >>> aligner = xkd.Aligner(xkd.plan("mapping.yaml"), teacher=teacher, student=student)
    >>> out = aligner(input_ids=torch.arange(32).view(2, 16))
    >>> list(out.parts), out.loss.requires_grad
    (['output.1'], True)
    """

    def __init__(
        self, plan: Plan, *, teacher: PreTrainedModel | Layout, student: PreTrainedModel | Layout, stage: int | str = 0
    ) -> None:
        super().__init__()
        self.stage = stage_of(plan, stage)
        self._custom = plan.custom
        # Before the student's layout is read, which holds the modules that adapters wrap.
        self.adapters = Adapters(student, self.stage, seed=plan.mapping.seed)
        student_layout = layout_of(self.adapters.student, plan.mapping.student.paths)
        teacher_layout = layout_of(teacher, plan.mapping.teacher.paths)
        self.student: PreTrainedModel = student_layout.model
        self.projectors = nn.ModuleDict()
        self.maps = nn.ModuleDict()
        depths = (len(student_layout.blocks), len(teacher_layout.blocks))
        self.entries = tuple(self._entry(name, plan.mapping.seed, depths) for name in self._names())
        device = next(self.student.parameters()).device
        self.projectors.to(device)
        self.maps.to(device)
        self.is_shuffled = plan.mapping.control == "shuffled"
        settings = self.stage.stage.tokens
        self.next_token = (
            None if settings is None else NextTokenObjective(settings, student_layout, teacher_layout, plan.custom)
        )
        self.balance = balance_of(self.stage)
        self.balanced_step: int | None = None  # the last one at which `observe_gradients` measured
        self._targets: StepTargets | None = None
        # In a tuple, so that the teacher is no child: it is neither trained, saved nor moved with the student.
        self._outside = (student_layout, TeacherFeatures(teacher_layout, self.targets().sites))
        freeze_others(self.student, self.stage.trainable)
        set_checkpointing(self.student, self.stage.stage.gradient_checkpointing)

    def _names(self) -> Iterable[str]:
        return dict.fromkeys(pair.align for pair in self.stage.pairs)

    def _entry(self, name: str, seed: int, depths: tuple[int, int]) -> Alignment:
        pairs = [pair for pair in self.stage.pairs if pair.align == name]

        def generator(pair: PairPlan) -> torch.Generator:
            number = self.stage.pairs.index(pair)
            return torch.Generator().manual_seed(seed * 1_000_003 + self.stage.index * 10_007 + number)

        return Alignment(
            self.stage.align_of(pairs[0]),
            pairs,
            depths,
            projectors=self.projectors,
            maps=self.maps,
            generators=generator,
            custom=self._custom,
        )

    @property
    def reader(self) -> TeacherFeatures:
        """The reader of the teacher at this stage's sites, without a cache."""
        return self._outside[1]

    @cached_property
    def splitting_reason(self) -> str | None:
        """Reason that packed documents need rows of their own (`training.isolation`); None where they do not."""
        entries = [entry.align for entry in self.entries]
        return splitting_reason(entries, (self.layout, self.reader.layout))

    def parts(self, batch: Batch) -> tuple[Batch, ...]:
        """Return the parts of a micro-batch that `forward` takes one after another.

        No document of a packed row is read in the context of another: the batch itself where position ids keep its
        documents apart, or the documents as rows of their own, in groups of similar length.
        """
        return (batch,) if batch.position_ids is None or self.splitting_reason is None else batch.apart()

    @property
    def layout(self) -> Layout:
        """Layout of the student."""
        return self._outside[0]

    @property
    def needs_full_step_features(self) -> bool:
        """True if a step of several micro-batches needs the teacher's features of all of them first.

        The divisor of `relative_mse` is the teacher's squared norm over the whole step.
        """
        return any(objective.needs_full_step_features for entry in self.entries for objective in entry.objectives)

    def progress(self, step: int) -> float:
        """Return the share of the stage's steps that are done before step `step`, which counts from 0."""
        return min(max(step / self.stage.steps, 0.0), 1.0)

    def targets(self, step: int = 0) -> StepTargets:
        """Return the active pairs of a step and the teacher's sites that they need; worked out once per step."""
        if self._targets is None or self._targets.step != step:
            progress = self.progress(step)
            active = (entry for entry in self.entries if entry.schedule.factor(progress) > 0)
            pairs = tuple(pair for entry in active for pair in entry.active_pairs(step))
            self._targets = StepTargets(step=step, progress=progress, pairs=pairs, sites=self.sites_of(pairs))
        return self._targets

    def sites_of(self, pairs: tuple[ActivePair, ...]) -> tuple[Site, ...]:
        """Return the teacher's sites that these pairs need: their targets, and the inputs of the student's blocks."""
        found = [pair.site for pair in pairs]
        if self.stage.stage.inputs == "teacher":
            found += [block_input_site(self.stage.stage, pairs, pair) for pair in pairs]
        if self.stage.stage.tokens is not None:
            found.append(HEAD_INPUT)
        return tuple(dict.fromkeys(found))

    def normalizers(self, batch: Batch, features: Features | None = None, *, step: int = 0) -> LossNormalizers:
        """Return this micro-batch's share of the step's normalizers; squared norms need the teacher's `features`."""
        teacher_sq_norms = {}
        if features is not None and self.needs_full_step_features:
            for pair in self.targets(step).pairs:
                norm = pair.objective.teacher_sq_norm(features[pair.site], counts_of(pair.objective.entry, batch)[0])
                if norm is not None:
                    teacher_sq_norms[pair.objective.pair.name] = norm
        tokens, labelled, predictions = (
            torch.full((), count, dtype=torch.float64, device=batch.device)
            for count in (batch.tokens, batch.labelled_tokens, batch.predictions)
        )
        return LossNormalizers(
            tokens=tokens, labelled=labelled, predictions=predictions, teacher_sq_norms=teacher_sq_norms
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        batch: Batch | None = None,
        features: Features | None = None,
        normalizers: LossNormalizers | None = None,
        step: int = 0,
        objective: str | None = None,
    ) -> AlignerOutput:
        """Return the loss of one micro-batch, given as a `batch` or as the tensors of one, each [batch, time].

        `attention_mask` is 1 or true where a token counts; `labels`, unshifted, are -100 where the token objective
        leaves a token out. `features` are the teacher's (read here when not given), `normalizers` the step's divisors
        (those of this batch alone when not given), and `step` counts the optimizer steps of the stage from 0, which
        schedules, redrawn layer maps and temperatures follow. With `objective`, an entry's name or `tokens`, the loss
        is that objective alone without its balanced weight, and 0 where it is not active at the step.

        A stage with `weight: auto` trains after `training.loss_balancing.observe_gradients` of the same step.

        Raises NonFiniteLoss, which names the objective, and UsageError as `Batch` does. All checks of values are
        settled by one read of the device at the end, or by a collector of `ops.checks` that is active.
        """
        batch = self._batch(batch, input_ids, attention_mask, labels)
        with checks.settled_at_end(lambda collector: make_indices_known(collector, batch)):
            targets = self.targets(step)
            if features is None:
                features = self.reader.read(batch, sites=targets.sites)
            if normalizers is None:
                normalizers = self.normalizers(batch, features, step=step)
            sides, head_input = self.paired_features(targets.pairs, batch, features)
            terms: dict[str, dict[str, Tensor]] = {}
            maps: dict[str, Tensor] = {}
            for entry in self.entries:
                own = [pair for pair in targets.pairs if pair.objective.entry is entry.align]
                if own:
                    mask, count = counts_of(entry.align, batch)
                    divisors = normalizers.of_entry(entry.align)
                    found, auxiliary = entry.terms(own, sides, mask, divisors, targets.progress)
                    terms[entry.align.name], maps = found, maps | shares_of(auxiliary, count, divisors)
            if head_input is not None and self.next_token is not None:
                next_token, target = self.next_token, self.target(features, HEAD_INPUT)
                token = name_nonfinite(
                    TOKENS,
                    lambda: next_token.loss(head_input, target, batch.next_tokens, normalizers, targets.progress),
                )
                terms[TOKENS] = {TOKENS: token}
            if objective is not None:
                return _alone(objective, terms, batch)
            require_balanced(self.balance, self.balanced_step, step)
            return self._output(terms, maps)

    def _batch(
        self, batch: Batch | None, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None
    ) -> Batch:
        """Return the batch that `forward` was given, in whichever of its two forms."""
        if (batch is None) == (input_ids is None) or (batch is not None and (attention_mask, labels) != (None, None)):
            raise UsageError(
                "a micro-batch is given as batch=, or as input_ids with attention_mask and labels",
                found="neither" if batch is None else "both",
                fix="aligner(input_ids=ids, attention_mask=mask, labels=labels)",
            )
        if batch is not None:
            return batch
        assert input_ids is not None
        mask = None if attention_mask is None else attention_mask.bool()
        return Batch(input_ids=input_ids, attention_mask=mask, labels=labels)

    def _output(self, terms: Mapping[str, Mapping[str, Tensor]], maps: Mapping[str, Tensor]) -> AlignerOutput:
        """Return the sum of all terms, balanced, and each term by name."""
        _require_finite({name: part for entry in terms.values() for name, part in entry.items()} | dict(maps))
        sums = {name: torch.stack(list(entry.values())).sum() for name, entry in terms.items()} | dict(maps)
        loss = torch.stack([self._scale(name) * term for name, term in sums.items()]).sum()
        scaled = {
            name: self._scale(entry) * term.detach() for entry, found in terms.items() for name, term in found.items()
        }
        return AlignerOutput(loss=loss, parts=scaled | {name: term.detach() for name, term in maps.items()})

    def _scale(self, entry: str) -> float:
        return 1.0 if self.balance is None else self.balance.scale(entry)

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters outside the student: projectors and maps."""
        return [*self.projectors.parameters(), *self.maps.parameters()]

    def fitted_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of projectors that the stage starts in closed form."""
        found = {id(parameter): parameter for entry in self.entries for parameter in entry.fitted_parameters()}
        return list(found.values())

    def paired_features(
        self, pairs: tuple[ActivePair, ...], batch: Batch, features: Features
    ) -> tuple[Callable[[ActivePair], tuple[Feature, Feature]], Feature | None]:
        """Run the student; return a function from a pair to its (student, teacher) features, and the head input.

        The head input is None where the stage has no token objective.
        """
        stage = self.stage.stage
        with self.autocast(batch.device):
            if stage.inputs == "student":
                read = traced(self.layout, stage, pairs, batch)
                return (
                    lambda pair: (
                        read[Site(pair.site.tap, pair.student_layer)],
                        self.target(features, pair.site),
                    ),
                    read.get(HEAD_INPUT) if stage.tokens is not None else None,
                )
            alone = replayed(self.layout, stage, pairs, batch, features)

        def sides(pair: ActivePair) -> tuple[Feature, Feature]:
            site = Site(pair.site.tap, pair.student_layer)
            return alone[site, block_input_site(stage, pairs, pair)], self.target(features, pair.site)

        return sides, None

    def target(self, features: Features, site: Site) -> Feature:
        """Return the teacher's feature that the student is compared with: with `control: shuffled`, of another row."""
        return of_other_rows(features[site]) if self.is_shuffled else features[site]

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the autocast of the student's pass on a device."""
        if self.stage.stage.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def layer_maps(self, step: int) -> dict[str, LayerMap]:
        """Return the learned layer maps at a step, by entry."""
        found = {entry.align.name: entry.layer_map(self.progress(step)) for entry in self.entries}
        return {name: layer_map for name, layer_map in found.items() if layer_map is not None}

    def trained_state(self, *, student: bool = True) -> dict[str, Tensor]:
        """Return the trained tensors and fitted constants of this stage (not copies).

        `student.…` parameters (left out on request), `projectors.…`, `maps.…`, and constants `fitted.<pair>.…`.
        """
        state: dict[str, Tensor] = {
            f"student.{name}": p for name, p in self.student.named_parameters() if p.requires_grad and student
        }
        for part in ("projectors", "maps"):
            state |= {f"{part}.{name}": value for name, value in getattr(self, part).state_dict().items()}
        return state | {
            f"fitted.{objective.pair.name}.{name}": value
            for entry in self.entries
            for objective in entry.objectives
            for name, value in objective.fitted.items()
        }

    @torch.no_grad()
    def load_trained_state(self, path: Path, *, student: bool = True) -> None:
        """Copy a file of `trained_state` into student, projectors, maps and constants.

        Raises CheckpointError if it is damaged or does not fit.
        """
        stored, _ = read_tensors(path)
        for entry in self.entries:
            for objective in entry.objectives:
                names = {name: f"fitted.{objective.pair.name}.{name}" for name in objective.to_fit}
                objective.fitted = {name: stored[key] for name, key in names.items() if key in stored}
        _check_keys(path, self.trained_state(student=student).keys(), stored.keys())
        self.copy_trained_state(stored, student=student)
        if self.balance is not None:
            self.balance = read_balance(self.balance, path)

    @torch.no_grad()
    def copy_trained_state(self, stored: Mapping[str, Tensor], *, student: bool = True) -> None:
        """Copy the tensors of a `trained_state` of this stage into student, projectors and maps."""
        for name, own in self.trained_state(student=student).items():
            if not name.startswith("fitted."):
                own.copy_(stored[name])


def _alone(objective: str, terms: Mapping[str, Mapping[str, Tensor]], batch: Batch) -> AlignerOutput:
    """Return one objective as the whole output."""
    found = terms.get(objective, {})
    _require_finite(found)
    # One that is not active has a backward pass, too, which reaches no parameter.
    none = torch.zeros((), device=batch.device, requires_grad=torch.is_grad_enabled())
    loss = torch.stack(list(found.values())).sum() if found else none
    return AlignerOutput(loss=loss, parts={name: term.detach() for name, term in found.items()})


def _require_finite(parts: Mapping[str, Tensor]) -> None:
    found = {name: part.detach() for name, part in parts.items()}

    def error() -> NonFiniteLoss:
        bad = [name for name, part in found.items() if not bool(torch.isfinite(part))]
        return NonFiniteLoss("the loss is not finite", asked=f"objective {', '.join(bad)}")

    if found:
        checks.require(checks.all_finite(*found.values()), error)


def _check_keys(path: Path, own: Iterable[str], stored: Iterable[str]) -> None:
    different = sorted(set(own) ^ set(stored))
    if different:
        raise CheckpointError(
            f"{path} does not hold what this stage trains",
            found=f"{len(different)} names differ, e.g. {different[0]}",
            fix="it belongs to another version of this run; give another --output",
        )
