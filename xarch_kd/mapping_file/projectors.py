"""Projectors of a mapping file: maps from the student's dimension to the teacher's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import Field

from xarch_kd.mapping_file.scalars import ConfigModel, Name

Init = Literal["auto", "ridge", "procrustes", "pca", "random"]


class ProjectorOptions(ConfigModel):
    """Options of every projector. With `share` all pairs of the entry have one projector."""

    share: bool = False

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `build_projector`."""
        return self.model_dump(exclude={"kind", "name", "init", "share"}, exclude_none=True)


class FittedProjectorOptions(ProjectorOptions):
    """Options of projectors that can start in closed form.

    `init` is that form, fitted to calibration text when the stage starts: `auto` is `procrustes` for an orthogonal
    projector, else `ridge`, and `random` where there is too little text.
    """

    bias: bool = False
    init: Init = "auto"


class MatrixProjectorOptions(FittedProjectorOptions):
    """One matrix; `orthogonal` keeps lengths and angles.

    `auto` is `linear` where the dimensions differ or the student is built fresh (its basis is its own); else none.
    """

    kind: Literal["auto", "linear", "orthogonal"]


class LowRankProjectorOptions(FittedProjectorOptions):
    """The product of two thin matrices; `rank` is a quarter of the smaller dimension unless given."""

    kind: Literal["low_rank"]
    rank: Annotated[int, Field(ge=1)] | None = None


class MLPProjectorOptions(FittedProjectorOptions):
    """One hidden layer of `hidden` units, twice the smaller dimension unless given."""

    kind: Literal["mlp"]
    hidden: Annotated[int, Field(ge=2)] | None = None


class PlainProjectorOptions(FittedProjectorOptions):
    """A projector given by its name alone."""

    kind: str


class CustomProjectorOptions(ProjectorOptions):
    """Projector passed from Python as `projectors={name: …}`; it starts as it is built."""

    init: ClassVar[Init] = "random"

    kind: Literal["custom"]
    name: Name


AnyProjector = (
    PlainProjectorOptions
    | MatrixProjectorOptions
    | LowRankProjectorOptions
    | MLPProjectorOptions
    | CustomProjectorOptions
)
ProjectorName = Literal["auto", "none", "linear", "low_rank", "mlp", "orthogonal"]
ProjectorWithOptions = Annotated[
    MatrixProjectorOptions | LowRankProjectorOptions | MLPProjectorOptions | CustomProjectorOptions,
    Field(discriminator="kind"),
]
PROJECTOR_OPTIONS: Final[tuple[type[ConfigModel], ...]] = get_args(get_args(ProjectorWithOptions)[0])
