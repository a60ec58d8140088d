"""The module that a stage trains: student and projectors, and the objectives between student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from xarch_kd.errors import CheckpointError, NonFiniteLoss, UsageError
from xarch_kd.losses.features import feature_loss, teacher_energy
from xarch_kd.losses.mixing import mixing_loss
from xarch_kd.losses.tokens import Head, TokenLoss, label_count, next_token_labels, token_loss
from xarch_kd.mapping_file.objectives import MixingMatch
from xarch_kd.mapping_file.plan import PairPlan, Plan, StagePlan
from xarch_kd.mixing import Mixing
from xarch_kd.models.frozen import frozen_names
from xarch_kd.projectors import Projector, build_projector
from xarch_kd.projectors.heads import head_map
from xarch_kd.taps.layout import Layout, layout_of
from xarch_kd.taps.replay import block_calls, read_block, read_mixing, run_mixer
from xarch_kd.taps.sites import Site
from xarch_kd.taps.trace import trace
from xarch_kd.training.counts import Counts
from xarch_kd.training.features import Feature, Features, TeacherReader

HEAD_INPUT = Site("head_input", None)
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class AlignerOutput:
    """`loss` has the gradient; `parts` are its weighted terms by objective, detached."""

    loss: Tensor
    parts: dict[str, Tensor]


class Aligner(nn.Module):
    """One stage of a plan as a module: student and projectors are inside it, the frozen teacher is not.

    `teacher` and `student` are models of the plan's configs. Parameters outside the stage's `train` are frozen here.
    For one's own loop: `Aligner(plan, teacher=…, student=…)(input_ids=…).loss.backward()`.
    """

    def __init__(
        self, plan: Plan, *, teacher: PreTrainedModel | Layout, student: PreTrainedModel | Layout, stage: int | str = 0
    ) -> None:
        super().__init__()
        self.stage = _stage_of(plan, stage)
        teacher_layout = layout_of(teacher, plan.mapping.teacher.paths)
        student_layout = layout_of(student, plan.mapping.student.paths)
        self.student: PreTrainedModel = student_layout.model
        # In a tuple, so that the teacher is no child: it is neither trained, saved nor moved with the student.
        self._outside = (student_layout, TeacherReader(teacher_layout, self.sites()))
        self.projectors = nn.ModuleDict()
        for index, pair in enumerate(self.stage.pairs):
            generator = torch.Generator().manual_seed(plan.mapping.seed * 1_000_003 + self.stage.index * 10_007 + index)
            options = {} if pair.tap == "mixing" else self.stage.align_of(pair).projector_options
            widths = (pair.student_width, pair.teacher_width)
            projector = build_projector(pair.projector, *widths, generator=generator, **options)
            if projector is not None:
                self.projectors[_key(pair)] = projector.to(self.student.device)
        self._freeze()
        _set_checkpointing(self.student, self.stage.stage.gradient_checkpointing)

    @property
    def reader(self) -> TeacherReader:
        """The reader of the teacher at this stage's sites, without a cache."""
        return self._outside[1]

    @property
    def needs_teacher_ahead(self) -> bool:
        """Whether a step of several micro-batches needs the teacher's features of all before the first: the divisor of
        `relative_mse` is the teacher's energy over the whole step."""
        return any(pair.loss == "relative_mse" for pair in self.stage.pairs)

    def sites(self) -> tuple[Site, ...]:
        """The teacher's sites that this stage reads: targets, and what the student's blocks are fed."""
        found = [_target(pair) for pair in self.stage.pairs]
        if self.stage.stage.inputs == "teacher":
            found += [self._feed(pair) for pair in self.stage.pairs]
        if self.stage.stage.tokens is not None:
            found.append(HEAD_INPUT)
        return tuple(dict.fromkeys(found))

    def _feed(self, pair: PairPlan) -> Site:
        """The teacher's site that the student's mixer or block is fed."""
        layer = pair.teacher_layer
        if self._mixer_alone(pair.student_layer):
            return Site("mixer_input", layer)
        return Site("hidden", layer - 1) if layer else Site("embedding", None)

    def _mixer_alone(self, student_layer: int | None) -> bool:
        """Whether running the mixer is enough: nothing but its output is matched and nothing around it learns."""
        taps = {pair.tap for pair in self.stage.pairs if pair.student_layer == student_layer}
        return taps <= {"mixer_output", "mixing"} and set(self.stage.stage.train) == {"mixers"}

    def _freeze(self) -> None:
        wanted = set(self.stage.trainable)
        unknown = wanted - {name for name, _ in self.student.named_parameters()}
        if unknown:
            raise UsageError(
                "the student is not the one that was planned: parameters to train are missing",
                asked=", ".join(sorted(unknown)[:3]),
                found=type(self.student).__name__,
            )
        # A student that was converted earlier and is trained further carries no plan that knows of these.
        wanted -= set(frozen_names(self.student))
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in wanted)

    def counts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        features: Features | None = None,
    ) -> Counts:
        """Return what this micro-batch adds to the step's counts; energies need the teacher's `features`."""
        mask = None if attention_mask is None else attention_mask.bool()
        tokens = torch.tensor(input_ids.numel(), dtype=torch.float64) if mask is None else mask.sum().double()
        energies = {}
        if features is not None:
            for pair in self.stage.pairs:
                if pair.loss == "relative_mse":
                    energies[pair.name] = teacher_energy(_tensor(features[_target(pair)]), mask)
        predictions = label_count(next_token_labels(input_ids, attention_mask, labels=labels))
        return Counts(tokens=tokens.to(input_ids.device), predictions=predictions, energies=energies)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        features: Features | None = None,
        counts: Counts | None = None,
    ) -> AlignerOutput:
        """Return the loss of one micro-batch `input_ids` [batch, time].

        `attention_mask` is true where a token counts (right-padded or packed); `labels`, unshifted, narrow the token
        objective with -100. `features` are the teacher's (read here when not given) and `counts` the step's divisors
        (this batch's own when not given). Raises NonFiniteLoss, which names the objective.
        """
        if features is None:
            features = self.reader.read(input_ids, attention_mask)
        if counts is None:
            counts = self.counts(input_ids, attention_mask, labels, features)
        with self._autocast(input_ids.device):
            student = self._student_features(input_ids, attention_mask, features)
        mask = None if attention_mask is None else attention_mask.bool()
        terms: dict[str, Tensor] = {}
        for pair in self.stage.pairs:
            terms[pair.name] = self._named(
                pair.name, lambda pair=pair: self._match(pair, student, features, mask, counts)
            )
        if self.stage.stage.tokens is not None:
            token = self._named(
                "tokens",
                lambda: self._tokens(input_ids, attention_mask, labels, _tensor(student[None]), features, counts),
            )
            terms["tokens"] = token.total
        loss = torch.stack(list(terms.values())).sum()
        parts = {name: term.detach() for name, term in terms.items()}
        if not bool(torch.isfinite(loss)):
            bad = [name for name, part in parts.items() if not bool(torch.isfinite(part))]
            raise NonFiniteLoss("the loss is not finite", asked=f"objective {', '.join(bad) or 'total'}")
        return AlignerOutput(loss=loss, parts=parts)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.stage.stage.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _student_features(
        self, input_ids: Tensor, attention_mask: Tensor | None, features: Features
    ) -> Mapping[PairPlan | None, Feature]:
        """What the student gives for each pair, and under None its head input when tokens are compared."""
        layout = self._outside[0]
        if self.stage.stage.inputs == "teacher":
            return self._replayed(layout, input_ids, attention_mask, features)
        taps: dict[str, list[int]] = {}
        for pair in self.stage.pairs:
            taps.setdefault(pair.tap, []).extend([] if pair.student_layer is None else [pair.student_layer])
        if self.stage.stage.tokens is not None:
            taps.setdefault("head_input", [])
        traced = trace(layout, input_ids, attention_mask, taps=taps)
        found: dict[PairPlan | None, Feature] = {
            pair: traced.at(pair.tap, pair.student_layer) for pair in self.stage.pairs
        }
        if self.stage.stage.tokens is not None:
            found[None] = traced.at("head_input")
        return found

    def _replayed(
        self, layout: Layout, input_ids: Tensor, attention_mask: Tensor | None, features: Features
    ) -> Mapping[PairPlan | None, Feature]:
        """Each student block, or its mixer alone, run on what the teacher's was fed."""
        calls = block_calls(layout, input_ids, attention_mask)
        groups: dict[tuple[int, Site], list[PairPlan]] = {}
        for pair in self.stage.pairs:
            if pair.student_layer is not None:
                groups.setdefault((pair.student_layer, self._feed(pair)), []).append(pair)
        found: dict[PairPlan | None, Feature] = {}
        for (layer, feed), pairs in groups.items():
            fed = _tensor(features[feed]).to(next(layout.blocks[layer].parameters()).dtype)
            taps = {pair.tap for pair in pairs}
            read: dict[str, Feature] = {}
            if feed.tap != "mixer_input":
                read.update(read_block(layout, layer, fed, calls, taps=sorted(taps)))
            if feed.tap == "mixer_input" and "mixer_output" in taps:
                read["mixer_output"] = run_mixer(layout, layer, fed, calls)
            if feed.tap == "mixer_input" and "mixing" in taps:
                read["mixing"] = read_mixing(layout, layer, fed, calls)
            found.update({pair: read[pair.tap] for pair in pairs})
        return found

    def _match(
        self,
        pair: PairPlan,
        student: Mapping[PairPlan | None, Feature],
        features: Features,
        mask: Tensor | None,
        counts: Counts,
    ) -> Tensor:
        loss = self.stage.align_of(pair).loss
        own, target = student[pair], features[_target(pair)]
        if isinstance(loss, MixingMatch):
            assert isinstance(own, Mixing)
            assert isinstance(target, Mixing)
            return pair.weight * _mixing(loss, own, target, mask, counts)
        projector = self._projector(pair)
        value = feature_loss(
            loss.kind,
            _tensor(own).float(),
            _tensor(target).float(),
            normaliser=counts.energies[pair.name] if loss.kind == "relative_mse" else counts.tokens,
            mask=mask,
            projector=projector,
            epsilon=getattr(loss, "epsilon", 1e-6),
            delta=getattr(loss, "delta", 1.0),
        )
        return pair.weight * value

    def _projector(self, pair: PairPlan) -> Projector | None:
        found = dict(self.projectors.items()).get(_key(pair))
        assert found is None or isinstance(found, Projector)
        return found

    def _tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        student_hidden: Tensor,
        features: Features,
        counts: Counts,
    ) -> TokenLoss:
        settings = self.stage.stage.tokens
        assert settings is not None
        student_head, teacher_head = _head(self._outside[0]), _head(self.reader.layout)
        shared = min(student_head.weight.shape[0], teacher_head.weight.shape[0])
        return token_loss(
            student_hidden.to(student_head.weight.dtype),
            student_head,
            _tensor(features[HEAD_INPUT]),
            teacher_head,
            next_token_labels(input_ids, attention_mask, labels=labels),
            normaliser=counts.predictions,
            divergence=settings.divergence
            if isinstance(settings.divergence, str)
            else settings.divergence.model_dump(),
            temperature=settings.temperature,
            weight=settings.weight,
            cross_entropy=settings.cross_entropy,
            temperature_squared=settings.temperature_squared,
            vocabulary=shared,
            logits_dtype=settings.logits_dtype,
        )

    def _named(self, name: str, compute: Callable[[], Value]) -> Value:
        try:
            return compute()
        except NonFiniteLoss as error:
            raise NonFiniteLoss(error.message, asked=f"objective {name}", found=error.found) from error

    def trained_state(self) -> dict[str, Tensor]:
        """Return what this stage trains: `student.…` parameters and `projectors.…`, as they are (not copies)."""
        state: dict[str, Tensor] = {
            f"student.{name}": p for name, p in self.student.named_parameters() if p.requires_grad
        }
        return state | {f"projectors.{name}": tensor for name, tensor in self.projectors.state_dict().items()}

    @torch.no_grad()
    def load_trained_state(self, path: Path) -> None:
        """Copy a file of `trained_state` into student and projectors. Raises CheckpointError if it does not fit."""
        own = self.trained_state()
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {path}", found=str(error), fix="delete it and run again with --resume"
            ) from error
        _check_keys(path, own.keys(), stored.keys())
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def _target(pair: PairPlan) -> Site:
    """Where the teacher is read for a pair."""
    return Site(pair.tap, pair.teacher_layer)


def _tensor(feature: Feature) -> Tensor:
    assert isinstance(feature, Tensor)
    return feature


def _mixing(loss: MixingMatch, student: Mixing, teacher: Mixing, mask: Tensor | None, counts: Counts) -> Tensor:
    heads = head_map(loss.heads, student.heads, teacher.heads)
    return mixing_loss(
        loss.distance,
        student,
        teacher,
        normaliser=counts.tokens,
        mask=mask,
        head_map=None if heads is None else heads.to(student.device),
        impl=loss.implementation,
        probes=loss.probes,
    )


def _check_keys(path: Path, own: Iterable[str], stored: Iterable[str]) -> None:
    different = sorted(set(own) ^ set(stored))
    if different:
        raise CheckpointError(
            f"{path} does not hold what this stage trains",
            found=f"{len(different)} names differ, e.g. {different[0]}",
            fix="it belongs to another version of this run; give another --output",
        )


def _stage_of(plan: Plan, stage: int | str) -> StagePlan:
    for candidate in plan.stages:
        if stage in (candidate.index, candidate.stage.name):
            return candidate
    names = ", ".join(f"{candidate.index} ({candidate.stage.name})" for candidate in plan.stages)
    raise UsageError("the plan has no such stage", asked=stage, allowed=names)


def _set_checkpointing(student: PreTrainedModel, wanted: bool) -> None:
    # transformers renamed the pair of methods in its fifth major version; releases that we allow have one or the other.
    word = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(student, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(student, f"{word}_checkpointing_disable")()


def _key(pair: PairPlan) -> str:
    """A ModuleDict's keys may not hold dots."""
    return pair.name.replace(".", "-")


def _head(layout: Layout) -> Head:
    return Head(
        weight=layout.head_weight, bias=layout.head_bias, scale=layout.logit_scale, softcap=layout.logit_softcap
    )
