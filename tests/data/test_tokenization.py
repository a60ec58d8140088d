"""Documents of every shape to token ids and labels, against transformers and by hand; messages for bad input."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from xarch_kd.data.records import Record
from xarch_kd.data.shapes import Shapes
from xarch_kd.data.tokenization import DocumentTokenizer, TokenizedPart
from xarch_kd.errors import DataError
from xarch_kd.mapping_file.schema import Text
from xarch_kd.testing.tiny import tiny_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<' + message.role + '>\n' + message.content + '</>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<assistant>\n' }}{% generation %}{{ message.content + '</>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<' + message.role + '>\n' + message.content + '</>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2 "},
]


def tokenizer(template: str | None = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return the tokenizer of characters, with a chat template, and one that adds a bos token if asked."""
    made = tiny_tokenizer()
    made.chat_template = template
    if bos:
        made.add_special_tokens({"bos_token": "<s>"})
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.convert_tokens_to_ids("<s>"))]
        )
    return made


def tokenized(
    rows: Iterable[dict[str, Any]], made: Any = None, **settings: Any
) -> tuple[list[list[int]], list[list[bool] | None], DocumentTokenizer]:
    """Return ids and labels of the documents of rows."""
    text = Text(files=("x",), **settings)
    documents = DocumentTokenizer(made or tokenizer(), text)
    records = (Record(f"file:{number}", row) for number, row in enumerate(rows, 1))
    parts: list[TokenizedPart] = []
    for batch in documents.batches(Shapes(text).documents(records)):
        parts.extend(documents.tokenize(batch))
    ids = [part.ids.tolist() for part in parts]
    return ids, [None if part.counted is None else part.counted.tolist() for part in parts], documents


def counted_text(made: Any, ids: list[int], counted: list[bool] | None) -> str:
    assert counted is not None and len(counted) == len(ids)
    return made.decode([token for token, is_counted in zip(ids, counted, strict=True) if is_counted])


def test_plain_text_ends_with_the_eos_token_and_blank_texts_are_left_out() -> None:
    made = tokenizer()
    ids, counted, documents = tokenized([{"text": "ab"}, {"text": " \n"}, {"text": "c<|end|>"}], made)
    assert ids == [made("ab")["input_ids"] + [0], made("c")["input_ids"] + [0]]
    assert counted == [None, None] and documents.blank == 1


@pytest.mark.parametrize(("bos", "adds"), [("auto", True), ("always", True), ("never", False)])
def test_bos_follows_the_post_processor_of_the_tokenizer(bos: str, adds: bool) -> None:
    made = tokenizer(bos=True)
    ids, _, _ = tokenized([{"text": "ab"}], made, bos=bos)
    assert ids == [made("ab", add_special_tokens=adds)["input_ids"] + [0]]
    assert (ids[0][0] == made.bos_token_id) is adds


def test_bos_is_not_doubled_and_always_adds_it_where_the_tokenizer_does_not() -> None:
    made = tokenizer(bos=True)
    assert tokenized([{"text": "<s>ab"}], made)[0] == tokenized([{"text": "ab"}], made)[0]
    plain = tokenizer()
    assert tokenized([{"text": "ab"}], plain, bos="always")[0] == [[0, *plain("ab")["input_ids"], 0]]
    assert tokenized([{"text": "ab"}], plain, eos="never")[0] == [plain("ab")["input_ids"]]


def test_bos_is_found_by_a_tokenizer_that_has_no_token_for_a_letter() -> None:
    made = Tokenizer(models.BPE({"<s>": 0, "b": 1}, []))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (ids,), _, _ = tokenized([{"text": "bb"}], PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"))
    assert ids == [0, 1, 1]


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_that_the_tokenizer_lacks_cannot_be_asked_for(name: str) -> None:
    made = tokenizer()
    setattr(made, f"{name}_token", None)
    with pytest.raises(DataError, match=f"{name}: always, but the tokenizer has no {name} token"):
        tokenized([{"text": "a"}], made, **{name: "always"})


def test_conversations_are_as_the_template_writes_them() -> None:
    made = tokenizer(bos=True)
    expected: Any = made.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    row = {"messages": CHAT}
    ids, counted, _ = tokenized([row], made, train_on="all")
    assert ids == [expected["input_ids"]] and counted == [None]
    always = tokenized([row], made, train_on="all", bos="always", eos="always")[0][0]
    assert always == [made.bos_token_id, *expected["input_ids"], 0]
    with_bos = tokenizer("<s>" + CHATML + "<|end|>", bos=True)
    assert tokenized([row], with_bos, train_on="all")[0][0] == always
    assert tokenized([row], with_bos, train_on="all", bos="never", eos="never")[0][0] == expected["input_ids"]


@pytest.mark.parametrize(
    ("template", "settings", "text"),
    [
        (CHATML, {}, "1</>\n2 </>\n"),
        (CHATML, {"train_on": "assistant"}, "1</>\n2 </>\n"),
        (CHATML, {"train_on": "completions"}, "2 </>\n"),
        (MARKED, {}, "1</>2 </>"),
        (MARKED, {"train_on": "completions"}, "2 </>\n"),
    ],
)
def test_labels_are_the_turns_of_the_assistant(template: str, settings: dict[str, Any], text: str) -> None:
    made = tokenizer(template)
    (ids,), (counted,), _ = tokenized([{"messages": CHAT}], made, **settings)
    assert made.decode(ids) == made.apply_chat_template(CHAT, tokenize=False)
    assert counted_text(made, ids, counted) == text


def test_marked_labels_are_those_of_transformers() -> None:
    made = tokenizer(MARKED)
    expected: Any = made.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    (ids,), (counted,), _ = tokenized([{"messages": CHAT}], made)
    assert (ids, list(map(int, counted or []))) == (expected["input_ids"], expected["assistant_masks"])


def test_prompt_and_completion_are_one_text_whose_second_part_is_counted() -> None:
    made = tokenizer()
    (ids,), (counted,), _ = tokenized([{"prompt": "2+2=", "completion": "4"}], made)
    assert made.decode(ids) == "2+2=4<|end|>" and counted_text(made, ids, counted) == "4<|end|>"
    messages = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    (ids,), (counted,), _ = tokenized([messages], made)
    assert counted_text(made, ids, counted) == "1</>\n<user>\nTwo?</>\n<assistant>\n2 </>\n"
    (ids,), (counted,), _ = tokenized([messages], made, train_on="assistant")
    assert counted_text(made, ids, counted) == "1</>\n2 </>\n"


def test_a_token_across_the_border_of_a_completion_is_counted() -> None:
    made = byte_level()
    prompt, completion = "def f(x): return ", "value + value"
    (ids,), (counted,), _ = tokenized([{"prompt": prompt, "completion": completion}], made)
    assert ids == made(prompt + completion)["input_ids"] + [made.eos_token_id]
    assert counted_text(made, ids, counted).removesuffix("<|end|>").strip() == completion


def test_tools_reach_the_template_and_may_be_json() -> None:
    made = tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]
    rows = [{"messages": CHAT, "tools": tools}, {"messages": CHAT, "tools": json.dumps(tools)}, {"messages": CHAT}]
    ids, _, _ = tokenized(rows, made)
    assert made.decode(ids[0]) == made.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert ids[0] == ids[1] and made.decode(ids[2]) == made.apply_chat_template(CHAT, tokenize=False)


def test_token_ids_keep_their_labels_and_lose_their_padding() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [-100, -100, -100]},
    ]
    ids, counted, _ = tokenized(rows)
    assert ids == [[5, 6, 7], [5, 6]] and counted == [[False, True, True], [False, False]]
    assert tokenized(rows, train_on="all")[1] == [None, None]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"other": "x"}], {}, r"file:1: no text under 'text'[\s\S]*columns: other[\s\S]*column: other"),
        ([{"text": "a"}], {"column": "txt"}, r"no text under 'txt' Did you mean 'text'\?"),
        ([{"text": None}], {}, r"file:1: the column 'text' holds no text\n  found:   null"),
        ([{"text": "a\0"}], {}, r"file:1: the column 'text' cannot be tokenized\n  found:   a NUL character after 1"),
        ([{"text": "\ud83d"}], {}, r"a lone surrogate \\ud83d"),
        ([{"text": "a", "messages": CHAT}], {}, r"fit more than one shape[\s\S]*shape: text"),
        ([{"text": "a"}, {"messages": CHAT}], {}, r"file:2: a document of another shape[\s\S]*text, as in file:1"),
        ([{"text": "a"}, {"body": "b"}], {}, r"file:2: no text under 'text'[\s\S]*columns: body"),
        ([{"text": "a"}], {"train_on": "assistant"}, r"train_on: assistant, but plain text has no assistant's turns"),
        ([{"prompt": "a", "completion": "b"}], {"train_on": "assistant"}, "prompt and completion have no assistant"),
        ([{"prompt": "a", "completion": CHAT}], {}, r"are of different kinds[\s\S]*prompt: str, completion: list"),
        ([{"messages": "a"}], {"shape": "messages"}, r"holds no conversation\n  found:   str"),
        ([{"messages": json.dumps(CHAT)}], {"column": "messages"}, r"holds no conversation\n  found:   str"),
        ([{"messages": []}], {}, "an empty list"),
        ([{"messages": [{"from": "human", "value": "a"}]}], {}, r"message 0 has no role[\s\S]*rename the keys"),
        ([{"messages": CHAT[:2]}], {}, r"without an assistant's turn[\s\S]*user: One\?[\s\S]*train_on: all"),
        ([{"messages": CHAT, "tools": [{"function": {"name": "add"}}]}], {}, "leaves out the tool 'add'"),
        ([{"messages": CHAT[2:]}], {}, "begins with the assistant"),
        ([{"messages": CHAT, "tools": "{"}], {}, "the column 'tools' is not JSON"),
        (
            [{"input_ids": [5, 6], "labels": [6, -100]}],
            {},
            r"labels are neither[\s\S]*label 6 for token 5 at position 0",
        ),
        ([{"input_ids": [5], "labels": [5, 6]}], {}, r"'labels' does not fit[\s\S]*2 values for 1 ids"),
        ([{"input_ids": [5, 97]}], {}, r"does not have\n  found:   97\n  allowed: 0 to 96"),
        ([{"input_ids": [5, 6], "attention_mask": [0, 1]}], {}, "attention_mask is not 1 for the tokens"),
        ([{"input_ids": "5 6"}], {}, "holds no list of token ids"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenized(rows, **settings)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"the chat template fails[\s\S]*system: Be[\s\S]*must alter"),
        ("{{ messages | length }}" + CHATML, "writes turns in another way when the conversation goes on"),
        (CHATML.replace("{% for", "{% set messages = messages[1:] %}{% for"), r"leaves out message 0 \(role system\)"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_with_the_conversation(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tokenized([{"messages": CHAT}], tokenizer(template))
    assert "user: One?" in str(caught.value)


def test_a_shown_conversation_is_short_and_has_no_control_characters() -> None:
    chat = [{"role": "user", "content": "\x1b[31m" + "x" * 10_000} for _ in range(9)]
    with pytest.raises(DataError, match=r"\\x1b\[31mx+…[\s\S]*3 more messages") as caught:
        tokenized([{"messages": chat}])
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1500


def byte_level() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that is trained on some code."""
    import inspect

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([inspect.getsource(json), inspect.getsource(Shapes)], trainer)
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def test_long_texts_in_windows_are_what_one_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    made, text = byte_level(), inspect.getsource(json).replace("json", "日本 json") * 3
    expected = made(text)["input_ids"] + [made.eos_token_id]
    for name, value in {"LONGEST_CALL": 2000, "WINDOW": 1000, "OVERLAP": 200, "PIECE": 77}.items():
        monkeypatch.setattr(f"xarch_kd.data.long_text.{name}", value)
    source = Text(files=("x",))
    documents = DocumentTokenizer(made, source)
    pieces = (text[start : start + 501] for start in range(0, len(text), 501))
    batches = documents.batches(Shapes(source).documents([Record("a.txt", pieces=pieces)]))
    parts = [part for batch in batches for part in documents.tokenize(batch)]
    assert len(parts) > 10 and numpy.concatenate([part.ids for part in parts]).tolist() == expected
    assert [part.content is None for part in parts[-2:]] == [True, False]
    monkeypatch.undo()
    # The same text as one document has the same hash, so it is on the same side of a split.
    whole = documents.batches(Shapes(source).documents([Record("a", {"text": text})]))
    assert next(documents.tokenize(next(whole))).content == parts[-1].content


def test_a_text_whose_windows_have_no_common_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, value in {"LONGEST_CALL": 1000, "WINDOW": 1000, "OVERLAP": 200, "PIECE": 100}.items():
        monkeypatch.setattr(f"xarch_kd.data.long_text.{name}", value)
    with pytest.raises(DataError, match=r"file:1: a text of more than 1,000 characters[\s\S]*without blanks"):
        tokenized([{"text": "x" * 5000}], PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?"))
