"""Errors with what was asked, what was found, what is allowed and how to fix it.

Only the standard library is imported here, so that every package and the command line can raise them cheaply.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from typing import Final, ParamSpec, TypeVar

# Share of letters, in their order, from which on a word is taken for a misspelling; a word of how many letters may be
# left unfinished, and one of how many may have two of them wrong.
SIMILAR: Final = 0.85
SHORT_WORD: Final = 4
LONG_WORD: Final = 8

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


# Characters that act on a terminal instead of being shown there, except tab and newline: control characters, marks that
# reverse the order of text, and lone surrogates, which cannot be printed at all.
_ACTING: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text for a terminal: escape sequences and other control characters are shown, e.g. as `\\x1b`."""
    return _ACTING.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


class XarchError(Exception):
    """Base class of all errors that `xarch_kd` raises.

    `exit_code` is the exit code of the command line: 1 a gate failed, 2 usage or mapping file, 3 data or model,
    130 interrupted and resumable.

    >>> import xarch_kd as xkd
    >>> try:
    ...     xkd.plan("nowhere.yaml")
    ... except xkd.XarchError as error:
    ...     print(error)
    nowhere.yaml: there is no such file. `xarch-kd init TEACHER` writes one.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        asked: object | None = None,
        found: object | None = None,
        allowed: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.asked = asked
        self.found = found
        self.allowed = allowed
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        details = (("asked", self.asked), ("found", self.found), ("allowed", self.allowed), ("fix", self.fix))
        lines = [f"  {label + ':':<9}{value}" for label, value in details if value is not None]
        return printable("\n".join([self.message, *lines]))


class UsageError(XarchError):
    """A call, an option or a folder that cannot be used as asked."""

    exit_code = 2


class MappingFileError(UsageError):
    """One or more problems of a mapping file, each already formatted as `file:line:column: place: what`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ModelError(XarchError):
    """A model, checkpoint or tokenizer that cannot be read or is not what was asked for."""


class ConversionError(ModelError):
    """A teacher that no stock student class represents exactly, or a conversion whose check failed."""


class TapError(ModelError):
    """A tap that a model family does not have, or a model whose modules are not known."""


class DataError(XarchError):
    """Text that is empty, too short or unreadable."""


class NonFiniteLoss(XarchError):
    """A loss or gradient that is NaN or infinite; raised before the optimizer step."""


class RolloutCollapse(XarchError):
    """Continuations of the student that repeat themselves or do not end, in a stage that stops for it."""


class CheckpointError(XarchError):
    """A checkpoint that cannot be written or does not belong to this run."""


class ProcessError(XarchError):
    """Another process of the run failed, or does not answer."""


class Interrupted(XarchError):
    """The run was stopped by a signal; the message has where a resumed run starts."""

    exit_code = 130


class GateFailed(XarchError):
    """A measured figure is outside the bound it was asked to hold."""

    exit_code = 1


def check_table(what: str, table: Iterable[object], names: Iterable[object]) -> None:
    """Raise XarchError, on import of the module that owns a table, unless the table has exactly these names."""
    have, wanted = set(table), set(names)
    if have != wanted:
        missing, unknown = (", ".join(sorted(map(_shown, part))) or "none" for part in (wanted - have, have - wanted))
        raise XarchError(
            f"The table of {what} does not fit the names that are allowed. This is a bug in xarch-kd.",
            found=f"missing: {missing}; without a name: {unknown}",
        )


def _shown(name: object) -> str:
    return name.__name__ if isinstance(name, type) else str(name)


def suggest(word: str, options: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for an option that `word` may be a misspelling of, or an empty string.

    That is one at a distance of one letter (left out, added, exchanged or swapped with the next), two in words of at
    least eight letters, one that it is the beginning of, or one that shares most letters with it in their order.
    """
    scored = {option: difflib.SequenceMatcher(None, word, option).ratio() for option in dict.fromkeys(options)}
    near = [
        option
        for option, ratio in scored.items()
        if ratio >= SIMILAR
        or (len(word) >= SHORT_WORD and option.startswith(word))
        or _misspelt(word, option) <= (2 if min(len(word), len(option)) >= LONG_WORD else 1)
    ]
    return f" Did you mean '{max(near, key=lambda option: scored[option])}'?" if near else ""


def _misspelt(word: str, option: str) -> int:
    """Return how many letters must be left out, added, exchanged or swapped with the next to get from one to another.

    The distance of Damerau and Levenshtein without repeated changes of a letter; more than 2 need not be exact.
    """
    if abs(len(word) - len(option)) > 2:
        return 3
    before, row = list[int](), list(range(len(option) + 1))
    for i, letter in enumerate(word, 1):
        oldest, before, row = before, row, [i]
        for j, other in enumerate(option, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other)))
            if i > 1 and j > 1 and (letter, word[i - 2]) == (option[j - 2], other):
                row[j] = min(row[j], oldest[j - 2] + 1)
    return row[-1]


def renamed(word: str, now: str, *, kind: str) -> str:
    """Return the message for a key, option or argument that has a new spelling."""
    return f"the {kind} '{word}' is now spelled '{now}'."


def renamed_arguments(**now: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Refuse old spellings of a function's arguments with a UsageError that names the new one: `old="new"`."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            for word in now.keys() & kwargs.keys():
                raise UsageError(
                    f"{function.__name__}: {renamed(word, now[word], kind='argument')}",
                    asked=f"{word}={kwargs[word]!r}",
                    fix=f"{now[word]}={kwargs[word]!r}",
                )
            return function(*args, **kwargs)

        return checked

    return decorate
