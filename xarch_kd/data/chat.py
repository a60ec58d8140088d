"""Conversations as text through the tokenizer's chat template, and the parts of it that are to be predicted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from xarch_kd.data.shapes import Conversation
from xarch_kd.errors import DataError

# Characters of a message's end that the rendered text must have.
TAIL: Final = 64
# Messages of a conversation that an error shows, and characters of each.
SHOWN_MESSAGES: Final = 6
SHOWN_CHARACTERS: Final = 100
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class RenderedText:
    """Text of a document, and the half-open ranges of its characters that are to be predicted (None: all)."""

    place: str
    text: str
    spans: tuple[tuple[int, int], ...] | None = None


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(self, conversation: Conversation, train_on: str) -> RenderedText:
        """Return a conversation as text, with the parts that `train_on` (all, completions, assistant) counts.

        Parts are found by rendering the conversation up to each of the assistant's turns, which must be the beginning
        of the whole. The prompt that a template writes ahead of a turn is not counted, the end of the turn is.

        Raises DataError, with the conversation, for a tokenizer without a template, a template that fails or leaves a
        message or tools out, a conversation without an assistant's turn, and a template that writes the beginning of a
        conversation in another way when it goes on.
        """
        text = self._text(conversation, len(conversation.messages))
        _check_complete(conversation, text)
        if train_on == "all":
            return RenderedText(conversation.place, text)
        spans = tuple(self._span(conversation, text, *turn) for turn in _turns(conversation, train_on))
        return RenderedText(conversation.place, text, spans)

    def marks_generation(self, conversation: Conversation) -> bool:
        """Return whether the template marks the assistant's parts with `{% generation %}`."""
        self._check_exists(conversation)
        template = self._tokenizer.get_chat_template(tools=conversation.tools)
        return GENERATION.search(template) is not None

    def marked(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Return the token ids of a conversation, and which are in the parts that the template marks.

        Errors as in `render`.
        """
        _check_complete(conversation, self._text(conversation, len(conversation.messages)))
        _turns(conversation, "assistant")
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:
            raise _fails(conversation, error) from error
        return encoded["input_ids"], [bool(value) for value in encoded["assistant_masks"]]

    def _check_exists(self, conversation: Conversation) -> None:
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{conversation.place}: a conversation, but the tokenizer has no chat template",
                found=shown(conversation),
                allowed="a tokenizer with a chat template, or data of plain text or prompt and completion",
                fix="name the tokenizer of an instruct model in the mapping file: teacher: {tokenizer: …}",
            )

    def _text(self, conversation: Conversation, messages: int, *, prompts: bool = False) -> str:
        """Return the text of the first `messages` messages; with `prompts`, up to where an assistant's turn begins."""
        self._check_exists(conversation)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    conversation.messages[:messages],
                    tools=conversation.tools,
                    tokenize=False,
                    add_generation_prompt=prompts,
                )
            )
        except Exception as error:
            raise _fails(conversation, error) from error

    def _span(self, conversation: Conversation, text: str, first: int, after: int) -> tuple[int, int]:
        """Return the characters of the turns `first` to `after` - 1, without the prompt that a template writes."""
        if first == 0:
            raise DataError(
                f"{conversation.place}: a conversation that begins with the assistant, whose turn cannot be found",
                found=shown(conversation),
                fix="leave it out, add a user's turn, or train_on: all",
            )
        end = text if after == len(conversation.messages) else self._text(conversation, after)
        for prompts in (True, False):
            start = self._text(conversation, first, prompts=prompts)
            if end.startswith(start) and text.startswith(end):
                return len(start), len(end)
        raise DataError(
            f"{conversation.place}: the chat template writes turns in another way when the conversation goes on, "
            f"so the assistant's part cannot be found (turn {first})",
            found=shown(conversation),
            allowed="a template whose text of the first messages is the beginning of the whole, or one with "
            "{% generation %}",
            fix="train_on: all, or a tokenizer whose template marks the assistant's part with {% generation %}",
        )


def _turns(conversation: Conversation, train_on: str) -> list[tuple[int, int]]:
    """Return the ranges of messages that are counted."""
    assistant = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not assistant:
        raise DataError(
            f"{conversation.place}: a conversation without an assistant's turn, under train_on: {train_on}",
            found=shown(conversation),
            allowed="at least one message with the role assistant",
            fix="leave such conversations out, or train_on: all",
        )
    if train_on == "assistant":
        return [(number, number + 1) for number in assistant]
    if conversation.completion is not None:
        return [(conversation.completion, len(conversation.messages))]
    return [(assistant[-1], assistant[-1] + 1)]


def _check_complete(conversation: Conversation, text: str) -> None:
    """Raise DataError for a message or a tool that the template leaves out."""
    missing = None
    for number, message in enumerate(conversation.messages):
        content = message.get("content")
        is_spoken = message["role"] in ("system", "user", "assistant")
        if is_spoken and isinstance(content, str) and content.strip()[-TAIL:] not in text:
            missing = f"message {number} (role {message['role']})"
    for tool in conversation.tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
        if isinstance(name, str) and name not in text:
            missing = f"the tool '{name}'"
    if missing is not None:
        raise DataError(
            f"{conversation.place}: the chat template leaves out {missing}",
            found=shown(conversation),
            fix="give data that the template has a place for, or another tokenizer: teacher: {tokenizer: …}",
        )


def _fails(conversation: Conversation, error: Exception) -> DataError:
    return DataError(
        f"{conversation.place}: the chat template fails on a conversation",
        asked=shown(conversation),
        found=_escaped(f"{type(error).__name__}: {error}")[: 3 * SHOWN_CHARACTERS],
        fix="change the conversation to what the template takes (roles, their order), or leave it out",
    )


def shown(conversation: Conversation) -> str:
    """Return a conversation in a few lines for a message: shortened, without control characters."""
    messages: Sequence[dict[str, Any]] = conversation.messages
    lines = []
    for message in messages[:SHOWN_MESSAGES]:
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
        line = f"{message['role']}: {text}"
        lines.append(_escaped(line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"))
    if len(messages) > SHOWN_MESSAGES:
        lines.append(f"… {len(messages) - SHOWN_MESSAGES} more messages")
    if conversation.tools:
        lines.append(f"({len(conversation.tools)} tools)")
    return "\n           ".join(lines)


def _escaped(text: str) -> str:
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)
