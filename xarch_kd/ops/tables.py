"""Tables of formulas: one row per name, read by every implementation of an operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, get_args

from xarch_kd.errors import UsageError, XarchError, suggest


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str:
        """Name that the row is looked up by."""
        ...


Row = TypeVar("Row", bound=Named)


def table(what: str, names: Any, rows: Iterable[Row]) -> Mapping[str, Row]:
    """Return the rows by name, in the order of `names`, a `Literal` of all names that users may pass.

    Raises:
        XarchError: a name without a row, a row without a name, or two rows of one name. Tables are built at import, so
            that a name without a formula is never computed with the formula of another.
    """
    listed, given = tuple(get_args(names)), list(rows)
    by_name = {row.name: row for row in given}
    missing, unlisted = [name for name in listed if name not in by_name], sorted(set(by_name) - set(listed))
    twice = sorted({row.name for row in given if sum(row.name == other.name for other in given) > 1})
    if missing or unlisted or twice:
        found = (("without a formula", missing), ("without a name", unlisted), ("with two formulas", twice))
        raise XarchError(
            f"The table of {what} is incomplete.",
            found="; ".join(f"{', '.join(wrong)} {how}" for how, wrong in found if wrong),
            allowed="one formula per name",
            fix="add the name to the Literal and its formula to the table, or remove both",
        )
    return MappingProxyType({name: by_name[name] for name in listed})


def look_up(what: str, name: object, rows: Mapping[str, Row]) -> Row:
    """Return the row `name`.

    Raises:
        UsageError: there is none of that name.
    """
    row = rows.get(name) if isinstance(name, str) else None
    if row is None:
        raise UsageError(f"There is no such {what}.{suggest(str(name), rows)}", asked=name, allowed=" | ".join(rows))
    return row
