"""One feature cache over all stages (`data.order: shared`): which stages use it, and its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from xarch_kd.mapping_file.schema import MappingFile, Stage
from xarch_kd.mapping_file.source_map import Problem
from xarch_kd.planning.cost import BYTES
from xarch_kd.planning.models import ModelHandle
from xarch_kd.planning.plan import StagePlan
from xarch_kd.planning.problems import Diagnostics
from xarch_kd.planning.stage import numbers_per_token, teacher_sites
from xarch_kd.taps.sites import Site


def cached_stages(mapping: MappingFile) -> tuple[Stage, ...]:
    """Return the stages that share a cache, none unless there are several."""
    found = tuple(stage for stage in mapping.stages if stage.cache_place != "off")
    return found if mapping.data.order == "shared" and len(found) > 1 else ()


def shared_sites(stages: Sequence[StagePlan]) -> tuple[Site, ...]:
    """Return the teacher's sites that any of the cached stages reads."""
    cached = (stage for stage in stages if stage.stage.cache_place != "off")
    return tuple(dict.fromkeys(site for stage in cached for site in teacher_sites(stage.stage, stage.pairs)))


def shared_problems(mapping: MappingFile) -> Iterator[Problem]:
    """Yield a problem for each stage whose cache cannot be that of the first stage that has one."""
    first, *others = cached_stages(mapping) or (None,)
    for stage in others:
        assert first is not None
        index = mapping.stages.index(stage)
        if stage.cache_place != first.cache_place:
            message = (
                f"with data.order: shared all stages have one cache, and stage {first.name} keeps it in "
                f"{first.cache_place}. Use cache: {first.cache_place}, or cache: off."
            )
            yield Problem(("stages", index, "cache"), message, on="key")
        rows = [part.batch_size or mapping.data.batch_size for part in (first, stage)]
        if rows[0] != rows[1]:
            message = (
                f"with data.order: shared a cached batch of stage {first.name} has {rows[0]} rows, and one of this "
                f"stage {rows[1]}. Give both one batch_size, or this stage cache: off."
            )
            yield Problem(("stages", index), message)


def with_shared_cache(
    mapping: MappingFile, stages: Sequence[StagePlan], teacher: ModelHandle, diagnostics: Diagnostics
) -> list[StagePlan]:
    """Return the stages with the bytes of the one cache at the first that uses it, and none at the others.

    Each batch is kept with the features that any stage reads. A cache above the highest limit is a problem.
    """
    names = [stage.name for stage in cached_stages(mapping)]
    own = [stage for stage in stages if stage.stage.name in names]
    if len(own) < 2:
        return list(stages)
    token = sum(numbers_per_token(site, teacher) for site in shared_sites(own)) * BYTES[teacher.dtype]
    batches = max(stage.distinct_batches for stage in own)
    total = batches * own[0].batch_size * mapping.data.sequence_length * token
    limit = max(stage.stage.cache_limit for stage in own)
    if total > limit:
        message = (
            f"the cache of stages {', '.join(names)} needs {total / 2**30:.1f} GiB for {batches} batches, more than "
            f"the limit of {limit / 2**30:.1f} GiB. Allow it (cache: {{where: {own[0].stage.cache_place}, limit_gib: "
            f"{-(-total // 2**30)}}}), draw fewer batches, or turn the cache of a stage off."
        )
        diagnostics.problems.append(Problem(("stages", own[0].index, "cache"), message))
    in_memory = own[0].stage.cache_place == "memory"
    changed = []
    for stage in stages:
        if stage not in own:
            changed.append(stage)
            continue
        size = total if stage is own[0] else 0
        held = total - stage.cache_bytes if in_memory else 0
        changed.append(replace(stage, cache_bytes=size, peak_bytes=stage.peak_bytes + held))
    return changed
