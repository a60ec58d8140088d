"""Prefix sources of a stage while it trains: the mixture, its schedules, replay, figures and collapse."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, RolloutCollapse
from xarch_kd.files import write_json
from xarch_kd.generation.replay import ReplayBuffer
from xarch_kd.generation.rollouts import RolloutFigures, Row, batch_of, prompts_of, roll_out, seed_of
from xarch_kd.generation.sampling import Sampling
from xarch_kd.losses.schedules import SHAPES
from xarch_kd.mapping_file.prefixes import SOURCES, Prefixes, Source
from xarch_kd.run.processes import Processes
from xarch_kd.training.aligner import Aligner

# Beside the other files of a checkpoint.
PREFIX_FILE: Final = "prefixes.json"
# Fractional parts of its multiples are spread evenly over 0 to 1, over any run of them.
GOLDEN: Final = (math.sqrt(5) - 1) / 2
SAMPLED: Final[tuple[Source, ...]] = ("student", "teacher")


@dataclass(frozen=True, kw_only=True)
class PrefixFigures:
    """Prefixes of one step, over all ranks: tokens, micro-batches per source, figures of each model's continuations.

    `mixture` are the shares of the sources at this step, `replayed` the micro-batches of the student that came from the
    buffer.
    """

    tokens: float
    mixture: Mapping[Source, float]
    batches: Mapping[str, int]
    replayed: int
    rollouts: Mapping[str, RolloutFigures]

    @property
    def line(self) -> str:
        """One line for the progress of a stage, empty in a step of data alone."""
        return "  ".join(
            f"{name} {found.tokens_per_second:,.0f} tokens/s, {found.mean_length:.1f} long, "
            f"{found.ended_share:.0%} ended, distinct-4 {found.distinct_4:.2f}"
            for name, found in self.rollouts.items()
            if found.rows
        )

    def event(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        sampled = {
            name: {
                "tokens_per_second": round(found.tokens_per_second, 1),
                "mean_length": round(found.mean_length, 2),
                "ended": round(found.ended_share, 4),
                "distinct_4": round(found.distinct_4, 4),
            }
            for name, found in self.rollouts.items()
            if found.rows
        }
        mixture = {name: round(share, 4) for name, share in self.mixture.items()}
        return {"mixture": mixture, "batches": dict(self.batches), "replayed": self.replayed, **sampled}


@dataclass
class _State:
    """State that a resumed stage needs besides the replay buffer.

    `drawn` counts micro-batches; `moved` is the way that an adaptive schedule has gone, and `reference` the metric that
    it compares with; `window` are the values of the student's figures at the last steps that it sampled.
    """

    drawn: int = 0
    moved: float = 0.0
    reference: float | None = None
    window: deque[list[float]] = field(default_factory=deque)
    is_warned: bool = False


class PrefixMixture:
    """Source of this rank's rows of each micro-batch of a stage: data, or continuations that a model samples.

    The source of a micro-batch follows from the seed, the stage and its number, and so does every sampled token from
    those and the row: all ranks choose the same source, each samples its own rows, and together they sample what one
    process samples. `steps` are those of the stage, `row_tokens` the length of its rows, `vocabulary` the tokens that
    both models have.
    """

    def __init__(
        self,
        settings: Prefixes,
        aligner: Aligner,
        *,
        seed: int,
        row_tokens: int,
        end_of_sequence: Sequence[int],
        processes: Processes,
    ) -> None:
        self.settings = settings
        self.aligner = aligner
        self.steps = aligner.stage.steps
        self.seed = seed
        self.row_tokens = row_tokens
        self.prompt_tokens = prompt_length(settings, row_tokens)
        self.end_of_sequence = tuple(end_of_sequence)
        self.processes = processes
        teacher = aligner.reader.layout.model
        self._models = {"student": aligner.student, "teacher": teacher}
        self._vocabulary = min(
            int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, arg-type, union-attr]
            for model in self._models.values()
        )
        self.replay = None
        if settings.replay is not None:
            rows = aligner.stage.batch_size
            self.replay = ReplayBuffer(capacity=settings.replay.capacity // rows, max_age=settings.replay.max_age)
        self._state = _State(window=deque(maxlen=settings.collapse.window))
        self._begin_step()

    def _begin_step(self) -> None:
        self._batches: dict[str, int] = dict.fromkeys(SOURCES, 0)
        self._replayed = 0
        self._tokens = 0
        self._rollouts = {name: RolloutFigures() for name in SAMPLED}

    def mixture(self, step: int) -> dict[Source, float]:
        """Return the shares of the sources at `step`, which counts from 0."""
        schedule = self.settings.schedule
        if schedule is None:
            way = 0.0
        elif schedule.kind == "adaptive":
            way = self._state.moved
        else:
            passed = (step / self.steps - schedule.start) / (schedule.end - schedule.start)
            way = SHAPES[schedule.kind](min(max(passed, 0.0), 1.0))
        to = self.settings if schedule is None else schedule.to
        return {
            name: (1 - way) * self.settings.share(name)
            + (way * (to.data if name == "data" else getattr(to, name)) if way else 0.0)
            for name in SOURCES
        }

    def source_of(self, index: int, step: int) -> Source:
        """Return the source of micro-batch `index` of the stage, which belongs to `step`."""
        offset = seed_of(self.seed, self.aligner.stage.index, 0) / 2**63
        passed, mixture = (offset + index * GOLDEN) % 1, self.mixture(step)
        for name in SOURCES:
            passed -= mixture[name]
            if passed < 0:
                return name
        return max(mixture, key=lambda name: mixture[name])

    def horizon(self, name: Source, longest_prompt: int, step: int) -> int:
        """Return the number of tokens that a model samples at most at `step`, after prompts of this length."""
        assert name != "data"
        limit = self.settings.source(name).max_new_tokens or max(1, self.row_tokens - longest_prompt)
        horizon = self.settings.horizon
        if horizon is None:
            return limit
        way = SHAPES[horizon.kind](min(step / self.steps / horizon.end, 1.0))
        return max(1, math.ceil(limit * (horizon.initial + (1 - horizon.initial) * way)))

    def own_rows(self, batch: Batch, step: int) -> Batch:
        """Return this rank's rows of the next micro-batch, of which `batch` are all rows of data.

        Raises UsageError for a prompt that does not fit into a model's context.
        """
        rank, ranks = self.processes.rank, self.processes.world_size
        index = self._state.drawn
        self._state.drawn += 1
        name = self.source_of(index, step)
        self._batches[name] += 1
        own = batch.shard(rank, ranks)
        if name != "data":
            rows = self._sampled(name, prompts_of(batch, self.prompt_tokens), index, step)
            own = batch_of(rows, origin=f"continuations by the {name} of {batch.origin}")
        self._tokens += own.tokens
        return own

    def _sampled(self, name: Source, prompts: Sequence[Row], index: int, step: int) -> list[Row]:
        """Return this rank's continuations of the prompts of a micro-batch, or rows of the replay buffer."""
        assert name != "data"
        rank, ranks, stage = self.processes.rank, self.processes.world_size, self.aligner.stage.index
        settings, own = self.settings.source(name), range(rank, len(prompts), ranks)
        keeps = name == "student" and self.replay is not None
        if keeps and not self._is_fresh(index, step):
            assert self.replay is not None
            self._replayed += 1
            return self.replay.draw(len(own), step=step, seed=seed_of(self.seed, stage, 2, index, rank))
        longest = max(len(prompt.ids) for prompt in prompts)
        sampling = Sampling(
            max_new_tokens=self.horizon(name, longest, step),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
        )
        with self.aligner.autocast(self._device) if name == "student" else torch.no_grad():
            rows, figures = roll_out(
                self._models[name],
                [prompts[row] for row in own],
                sampling,
                seeds=[seed_of(self.seed, settings.seed, stage, 3, index, row) for row in own],
                end_of_sequence=self.end_of_sequence,
                vocabulary=self._vocabulary,
            )
        self._rollouts[name] += figures
        if keeps:
            assert self.replay is not None
            self.replay.put(rows, step=step)
        return rows

    def _is_fresh(self, index: int, step: int) -> bool:
        """Return True if the student samples micro-batch `index` anew; the same on all ranks."""
        assert self.replay is not None and self.settings.replay is not None
        share = self.settings.replay.fresh_share
        fresh = share.initial + (share.final - share.initial) * step / self.steps
        drawn = seed_of(self.seed, self.aligner.stage.index, 1, index) / 2**63
        return drawn < fresh or self.replay.is_empty(step)

    @property
    def _device(self) -> torch.device:
        return next(self.aligner.student.parameters()).device

    def settle(self, step: int, summed: Callable[[Tensor], Tensor]) -> PrefixFigures:
        """Return the figures of a step over all ranks and begin the next one.

        `summed` returns the sum of a float64 vector over all ranks.
        """
        values = [value for name in SAMPLED for value in self._rollouts[name].values()]
        total = summed(torch.tensor([self._tokens, *values], dtype=torch.float64, device=self._device)).tolist()
        count = len(RolloutFigures().values())
        found = {
            name: RolloutFigures.of([*own[:-1], own[-1] / self.processes.world_size])
            for name, own in ((name, total[1 + at * count :][:count]) for at, name in enumerate(SAMPLED))
        }
        if found["student"].rows:
            self._state.window.append(found["student"].values())
        figures = PrefixFigures(
            tokens=total[0],
            mixture=self.mixture(step),
            batches=dict(self._batches),
            replayed=self._replayed,
            rollouts=found,
        )
        self._begin_step()
        return figures

    def collapse(self) -> str | None:
        """Return why the student's continuations have collapsed, once; None while they have not.

        Raises RolloutCollapse where the stage is to stop.
        """
        settings, window = self.settings.collapse, self._state.window
        if self._state.is_warned or len(window) < settings.window:
            return None
        figures = sum(map(RolloutFigures.of, window), RolloutFigures())
        reasons = []
        if figures.distinct_4 < settings.distinct_4:
            reasons.append(f"distinct-4 is {figures.distinct_4:.2f}, below {settings.distinct_4:g}")
        if 1 - figures.ended_share > settings.at_limit:
            reasons.append(f"{1 - figures.ended_share:.0%} reach their limit, more than {settings.at_limit:.0%}")
        if not reasons:
            return None
        found = f"{' and '.join(reasons)}, over {settings.window} steps"
        if settings.action == "stop":
            raise RolloutCollapse(
                "the student's continuations have collapsed",
                asked=f"prefixes.collapse of stage '{self.aligner.stage.stage.name}'",
                found=found,
                fix="lower the student's share or the horizon, raise that of data or of the teacher, or continue with "
                "collapse: {action: warn}",
            )
        self._state.is_warned = True
        return f"the student's continuations have collapsed: {found}"

    def observe(self, metric: float) -> None:
        """Let an adaptive schedule go on if the metric of an evaluation is worse than its reference by the tolerance.

        As DistiLLM does (arXiv:2402.03898): the reference is only replaced when the schedule goes on.
        """
        schedule = self.settings.schedule
        if schedule is None or schedule.kind != "adaptive":
            return
        if self._state.reference is None:
            self._state.reference = metric
        elif metric >= self._state.reference + schedule.tolerance:
            self._state.moved = min(1.0, self._state.moved + schedule.increment)
            self._state.reference = metric

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint, on every rank: rank 0 the common one, each its own replay buffer."""
        if self.processes.is_main:
            state = {**vars(self._state), "window": list(self._state.window)}
            write_json(folder / PREFIX_FILE, state)
        if self.replay is not None:
            self.replay.save(folder / f"replay-{self.processes.rank}-of-{self.processes.world_size}.safetensors")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it lacks the state."""
        try:
            state = json.loads((folder / PREFIX_FILE).read_text(encoding="utf-8"))
            window = deque(state.pop("window"), maxlen=self.settings.collapse.window)
            self._state = _State(**state, window=window)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder.name} does not hold the state of the stage's prefixes",
                found=str(error),
                fix="delete the checkpoint and run again with --resume",
            ) from error
        if self.replay is not None:
            rank, ranks = self.processes.rank, self.processes.world_size
            own = folder / f"replay-{rank}-of-{ranks}.safetensors"
            paths = [own] if own.exists() else sorted(folder.glob("replay-*-of-*.safetensors"))
            self.replay.load(paths, rank=rank, ranks=ranks)


def prompt_length(settings: Prefixes, row_tokens: int) -> int:
    """Return the tokens of a prompt in rows of text without labels, a quarter of the row by default."""
    return settings.prompt_tokens or max(1, row_tokens // 4)
