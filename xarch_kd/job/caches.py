"""Feature caches of a run: one per stage, or one over all stages that are cached (`data.order: shared`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xarch_kd.planning.plan import Plan, StagePlan
from xarch_kd.planning.shared_cache import cached_stages, shared_sites
from xarch_kd.run.folder import RunFolder
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import DiskCache, FeatureCache, MemoryCache

FOLDER = "features"


@dataclass(frozen=True, kw_only=True)
class StageCache:
    """Cache of a stage, None if it has none, and the sites that later stages read from it."""

    cache: FeatureCache | None
    ahead: tuple[Site, ...] = ()


class StageCaches:
    """Caches of the stages of one run, in memory or in `folder`."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._shared: FeatureCache | None = None

    def of(self, plan: Plan, stage: StagePlan) -> StageCache:
        """Return the cache that a stage reads and fills."""
        if stage.stage.cache_place == "off":
            return StageCache(cache=None)
        if not cached_stages(plan.mapping):
            return StageCache(cache=self._new(stage, self._folder.stage(stage.folder)))
        if self._shared is None:
            self._shared = self._new(stage, self._folder.stage(""))
        return StageCache(cache=self._shared, ahead=shared_sites(plan.stages[stage.index + 1 :]))

    def release(self, plan: Plan, stage: StagePlan) -> None:
        """Give up the cache of a finished stage, a shared one after the last stage that is cached."""
        if stage.stage.cache_place == "off":
            return
        if not cached_stages(plan.mapping):
            self._folder.drop(self._folder.stage(stage.folder) / FOLDER)
        elif all(later.stage.cache_place == "off" for later in plan.stages[stage.index + 1 :]):
            self._shared = None
            self._folder.drop(self._folder.stage("") / FOLDER)

    @staticmethod
    def _new(stage: StagePlan, place: Path) -> FeatureCache:
        return MemoryCache() if stage.stage.cache_place == "memory" else DiskCache(place / FOLDER)
