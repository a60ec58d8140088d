"""Checks of the prefix sources of a stage against its text, its cache, its evaluation and both models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from xarch_kd.mapping_file.prefixes import Prefixes
from xarch_kd.mapping_file.schema import Data, Stage
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.planning.models import ModelPair

SAMPLED: Final[tuple[Literal["student", "teacher"], ...]] = ("student", "teacher")


def prefix_problems(stage: Stage, data: Data, models: ModelPair, place: YamlPath) -> Iterator[Problem]:
    """Yield what keeps a stage from sampling its prefixes."""
    settings = stage.prefix_settings
    if settings is None:
        return
    own = (*place, "prefixes")
    if stage.cache_place != "off":
        message = (
            "sampled prefixes are new in each step, so that a cache of the teacher's features would only be written"
        )
        yield Problem((*place, "cache"), f"{message}. Use cache: off, or a stage without prefixes.")
    schedule = settings.schedule
    if schedule is not None and schedule.kind == "adaptive" and stage.evaluation is None:
        message = (
            "the schedule adaptive follows evaluations on held-out text. Add evaluation: {every: 50} to the stage."
        )
        yield Problem(own, message, on="key")
    rows = stage.batch_size or data.batch_size
    if settings.replay is not None and settings.replay.capacity < rows:
        message = f"must hold the rows of a micro-batch, {rows}, found {settings.replay.capacity}"
        yield Problem((*own, "replay", "capacity") if not isinstance(stage.prefixes, str) else own, message)
    yield from _length_problems(settings, data, models, own)


def _length_problems(settings: Prefixes, data: Data, models: ModelPair, place: YamlPath) -> Iterator[Problem]:
    """Yield prompts and continuations that do not fit into rows or into a model's positions."""
    row = data.sequence_length
    prompt = settings.prompt_tokens or max(1, row // 4)
    if prompt >= row:
        message = f"a prompt of {prompt} tokens leaves nothing to continue in rows of data.sequence_length {row}"
        yield Problem((*place, "prompt_tokens"), message)
        return
    for name in SAMPLED:
        if not settings.is_sampled(name):
            continue
        tokens = prompt + (settings.source(name).max_new_tokens or row - prompt)
        for side, model in (("teacher", models.teacher), ("student", models.student)):
            positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if isinstance(positions, int) and tokens > positions:
                message = (
                    f"{name} continues prompts of {prompt} tokens to {tokens}, and the {side} has {positions} "
                    f"positions. Lower prompt_tokens or {name}.max_new_tokens"
                )
                yield Problem(place, message, on="key")


def prefix_warnings(stage: Stage, data: Data, steps: int) -> Iterator[str]:
    """Yield how many tokens a stage samples at most, whose time is not in the plan."""
    settings = stage.prefix_settings
    if settings is None:
        return
    row = data.sequence_length
    prompt = settings.prompt_tokens or max(1, row // 4)
    batches = steps * stage.gradient_accumulation * (stage.batch_size or data.batch_size)
    mixtures: list[dict[Literal["student", "teacher"], float]] = [{name: settings.share(name) for name in SAMPLED}]
    if settings.schedule is not None:
        mixtures.append({name: getattr(settings.schedule.to, name) for name in SAMPLED})
    most = max(
        sum(share * (settings.source(name).max_new_tokens or row - prompt) for name, share in mixture.items())
        for mixture in mixtures
    )
    yield (
        f"stage {stage.name}: about {batches * most:,.0f} tokens are sampled at most, one after another in each row; "
        "their time is not in this estimate"
    )
