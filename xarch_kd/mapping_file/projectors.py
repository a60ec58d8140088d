"""Projectors of a mapping file: what bridges the student's and the teacher's dimension."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from xarch_kd.mapping_file.scalars import ConfigModel

Init = Literal["auto", "ridge", "procrustes", "pca", "random"]


class ProjectorPart(ConfigModel):
    """Options of every projector.

    `init` is its closed form on calibration text, fitted when the stage starts: `auto` is `procrustes` for an
    orthogonal one, else `ridge`, and `random` where there is too little text. With `share` all pairs of the entry have
    one projector.
    """

    bias: bool = False
    init: Init = "auto"
    share: bool = False

    def options(self) -> dict[str, Any]:
        """Return what `build_projector` takes, by its names."""
        return self.model_dump(exclude={"kind", "init", "share"}, exclude_none=True)


class MatrixProjector(ProjectorPart):
    """One matrix; `orthogonal` keeps lengths and angles.

    `auto` is `linear` where the dimensions differ or the student is built fresh (its basis is its own); else none.
    """

    kind: Literal["auto", "linear", "orthogonal"]


class LowRankProjector(ProjectorPart):
    """The product of two thin matrices; `rank` is a quarter of the smaller dimension unless given."""

    kind: Literal["low_rank"]
    rank: Annotated[int, Field(ge=1)] | None = None


class HiddenLayerProjector(ProjectorPart):
    """One hidden layer of `hidden` units, twice the smaller dimension unless given."""

    kind: Literal["mlp"]
    hidden: Annotated[int, Field(ge=2)] | None = None


class PlainProjector(ProjectorPart):
    """Projector given by its name alone."""

    kind: str


AnyProjector = PlainProjector | MatrixProjector | LowRankProjector | HiddenLayerProjector
ProjectorName = Literal["auto", "none", "linear", "low_rank", "mlp", "orthogonal"]
ProjectorWithOptions = Annotated[MatrixProjector | LowRankProjector | HiddenLayerProjector, Field(discriminator="kind")]
