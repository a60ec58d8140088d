"""Documents in the four shapes that records have: plain text, prompt and completion, conversation, token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from xarch_kd.data.records import Record, refused_characters
from xarch_kd.errors import DataError, suggest
from xarch_kd.losses.tokens import IGNORED_LABEL
from xarch_kd.mapping_file.schema import Text

# Columns that a shape needs; where one shape is found, other columns are not read.
NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "input_ids": ("input_ids",),
}
OPTIONAL: Final = ("tools", "labels", "attention_mask")
# Columns of conversations under other names, which are not read without being asked for.
OTHER_NAMES: Final = ("instruction", "content", "body")


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text, in pieces."""

    place: str
    pieces: Iterable[str]


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A text whose first part is a prompt."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template. `completion` is the index of the first message that answers the prompt."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    completion: int | None = None


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as they are, with which of them are to be predicted (None: all)."""

    place: str
    ids: list[int]
    counted: list[bool] | None = None


Document = PlainText | PromptCompletion | Conversation | TokenIds


def wanted_columns(text: Text) -> frozenset[str]:
    """Return the columns that are read from a source."""
    every = {*OPTIONAL, *(name for names in NEEDED.values() for name in names)}
    return frozenset(every | ({text.column} if text.column else set()))


@dataclass
class Shapes:
    """Shape of the documents of one source: that of its first record, which all others must have."""

    text: Text
    _first: tuple[str, str] | None = field(default=None, init=False)  # shape, and the place where it was found

    def documents(self, records: Iterable[Record]) -> Iterator[Document]:
        """Return the documents of records in order. Raises DataError for one of another shape, or that does not fit."""
        return map(self._document, records)

    def _document(self, record: Record) -> Document:
        if record.values is None:
            self._check_shape("text", record.place, "a file of plain text")
            return PlainText(record.place, record.pieces)
        shape, column = self._shape(record)
        self._check_shape(shape, record.place, f"columns: {_listed(record.columns)}")
        return _BUILDERS[shape](record, column, record.values)

    def _shape(self, record: Record) -> tuple[str, str]:
        """Return the shape of a record, and the column of plain text or of a conversation."""
        column, columns = self.text.column, record.columns
        if self.text.shape != "auto":
            names = (column,) if column else NEEDED[self.text.shape]
            if any(name not in columns for name in names):
                raise _without_column(record, ", ".join(names))
            return self.text.shape, names[0]
        if column is not None:
            if column not in columns:
                raise _without_column(record, column)
            # Conversations and ids that are written as a text are not plain text.
            if column in ("messages", "input_ids"):
                return column, column
            is_list = record.values is not None and isinstance(record.values[column], list)
            return "messages" if is_list else "text", column
        found = [shape for shape, names in NEEDED.items() if all(name in columns for name in names)]
        if not found:
            raise _without_column(record, "text")
        if len(found) > 1:
            raise DataError(
                f"{record.place}: the columns fit more than one shape",
                found=f"{', '.join(found)}, by the columns {_listed(columns)}",
                fix=f"choose one in the mapping file: shape: {found[0]}",
            )
        return found[0], NEEDED[found[0]][0]

    def _check_shape(self, shape: str, place: str, found: str) -> None:
        if self._first is None:
            self._first = shape, place
            if self.text.shape not in ("auto", shape):
                raise DataError(f"{place}: not of the shape {self.text.shape}", found=found)
        if self._first[0] != shape:
            raise DataError(
                f"{place}: a document of another shape than those before it",
                asked=f"{self._first[0]}, as in {self._first[1]}",
                found=f"{shape} ({found})",
                fix="write all documents of a source with the same columns, or make two sources of them",
            )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns)[:200] or "none"


def _without_column(record: Record, column: str) -> DataError:
    columns = record.columns
    other = next((name for name in OTHER_NAMES if name in columns), columns[0] if columns else "…")
    fix = f"name the column in the mapping file, e.g. column: {other}"
    if "conversations" in columns:
        fix = 'write conversations as messages: [{"role": "user", "content": "…"}, …]'
    return DataError(
        f"{record.place}: no text under '{column}'{suggest(column, columns)}",
        found=f"columns: {_listed(columns)}",
        allowed="text; prompt and completion; messages; input_ids; or the column that `column` names",
        fix=fix,
    )


def _string(record: Record, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{record.place}: the column '{column}' holds no text",
            found="null" if value is None else type(value).__name__,
            fix="leave such records out, or name another column: column: …",
        )
    _check_characters(record.place, column, value)
    return value


def _check_characters(place: str, column: str, value: str) -> None:
    reason = refused_characters(value)
    if reason is not None:
        raise DataError(
            f"{place}: the column '{column}' cannot be tokenized",
            found=reason,
            fix="write the source again without such characters, or leave the record out",
        )


def _plain(record: Record, column: str, values: Mapping[str, Any]) -> Document:
    return PlainText(record.place, (_string(record, column, values[column]),))


def _prompt_completion(record: Record, column: str, values: Mapping[str, Any]) -> Document:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*_messages(record, "prompt", prompt), *_messages(record, "completion", completion)]
        return Conversation(record.place, messages, _tools(record, values), completion=len(prompt))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(
            f"{record.place}: prompt and completion are of different kinds",
            found=f"prompt: {type(prompt).__name__}, completion: {type(completion).__name__}",
            allowed="two texts, or two lists of messages",
        )
    return PromptCompletion(record.place, _string(record, "prompt", prompt), _string(record, "completion", completion))


def _conversation(record: Record, column: str, values: Mapping[str, Any]) -> Document:
    return Conversation(record.place, _messages(record, column, values[column]), _tools(record, values))


def _messages(record: Record, column: str, messages: Any) -> list[dict[str, Any]]:
    """Return the messages, each with a role and content. Raises DataError for anything else."""
    place = f"{record.place}: the column '{column}'"
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else "null" if messages is None else type(messages).__name__
        raise DataError(f"{place} holds no conversation", found=found, allowed='[{"role": "user", "content": "…"}, …]')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            keys = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
            raise DataError(
                f"{place}: message {number} has no role",
                found=f"keys: {keys}"[:200],
                allowed='{"role": "user", "content": "…"}',
                fix="rename the keys (from, value) to role and content, and the roles to user and assistant"
                if isinstance(message, dict) and "from" in message
                else None,
            )
        content = message.get("content")
        if isinstance(content, str):
            _check_characters(record.place, column, content)
        elif content is not None and not isinstance(content, list):
            raise DataError(f"{place}: message {number} has content that is no text", found=type(content).__name__)
    return messages


def _tools(record: Record, values: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a conversation: a list of schemas, or one that is written as JSON."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{record.place}: the column 'tools' is not JSON", found=error.msg) from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{record.place}: the column 'tools' is not a list of tools",
            found=type(tools).__name__,
            allowed='[{"type": "function", "function": {"name": "…", …}}]',
        )
    return tools


def _token_ids(record: Record, column: str, values: Mapping[str, Any]) -> Document:
    ids, labels, mask = values[column], values.get("labels"), values.get("attention_mask")
    if not _integers(ids) or not ids:
        raise DataError(f"{record.place}: the column '{column}' holds no list of token ids", found=f"{ids!r:.80}")
    for name, other in (("labels", labels), ("attention_mask", mask)):
        if other is not None and (not _integers(other) or len(other) != len(ids)):
            found = f"{len(other)} values for {len(ids)} ids" if isinstance(other, list) else type(other).__name__
            raise DataError(f"{record.place}: the column '{name}' does not fit '{column}'", found=found)
    length = len(ids) if mask is None else sum(mask)
    if length == 0 or (mask is not None and mask != [1] * length + [0] * (len(ids) - length)):
        raise DataError(f"{record.place}: attention_mask is not 1 for the tokens and then 0 for padding")
    counted = None
    if labels is not None:
        for at, (label, token) in enumerate(zip(labels[:length], ids[:length], strict=True)):
            if label not in (IGNORED_LABEL, token):
                raise DataError(
                    f"{record.place}: labels are neither the token ids nor {IGNORED_LABEL}",
                    found=f"label {label} for token {token} at position {at}",
                    allowed=f"unshifted labels: the token itself where it is to be predicted, else {IGNORED_LABEL}",
                )
        counted = [label != IGNORED_LABEL for label in labels[:length]]
    return TokenIds(record.place, ids[:length], counted)


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


_BUILDERS: Final[dict[str, Callable[[Record, str, Mapping[str, Any]], Document]]] = {
    "text": _plain,
    "prompt_completion": _prompt_completion,
    "messages": _conversation,
    "input_ids": _token_ids,
}
