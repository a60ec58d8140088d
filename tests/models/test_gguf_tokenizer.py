"""Tokenizers in GGUF: read back they give the same tokens; those that llama.cpp would split otherwise are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from xarch_kd.errors import ModelError
from xarch_kd.models.gguf.tokenizer import PRE_TOKENIZERS, tokenizer_metadata
from xarch_kd.models.gguf.write import export_gguf
from xarch_kd.models.loading.load import load_tokenizer
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("gguf", reason="files are written with the gguf package")

TEXT = "the theme of 1984, then\n<|end|> a b"


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 97 tokens with the merges of "the"; `changes` are parts of its JSON."""
    letters = [chr(code) for code in range(33, 127)][: 97 - 6]
    table = {token: index for index, token in enumerate(["<|end|>", *letters, "Ġ", "Ċ", "th", "the", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(table, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    made.chat_template = "{{ messages[0].content }}"
    return made


def test_the_file_gives_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level()
    file = export_gguf(tiny_model("llama", vocab_size=100), tmp_path / "student.gguf", tokenizer).path
    loaded = load_tokenizer(str(file))
    assert tokenizer(TEXT)["input_ids"].count(tokenizer.convert_tokens_to_ids("the")) == 1
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.chat_template) == (0, 0, tokenizer.chat_template)
    assert loaded.convert_ids_to_tokens([97, 99]) == ["[PAD97]", "[PAD99]"]


def test_types_and_tokens_around_a_text() -> None:
    tokenizer = byte_level(
        post_processor=processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    found: dict[str, Any] = tokenizer_metadata(tokenizer, 99)
    assert found["tokenizer.ggml.tokens"][95:] == ["the", "Ġthe", "<tool>", "[PAD98]"]
    assert [found["tokenizer.ggml.token_type"][index] for index in (0, 1, 97, 98)] == [3, 1, 4, 5]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the"]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def test_pre_tokenizers_by_name() -> None:
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert tokenizer_metadata(byte_level(), 97)["tokenizer.ggml.pre"] == "gpt-2"
    assert tokenizer_metadata(byte_level(pre_tokenizer=digits), 97)["tokenizer.ggml.pre"] == "smollm"
    # As in the tokenizer.json of Qwen2.5.
    qwen2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    qwen2 += r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    nfc = byte_level(pre_tokenizer=split(qwen2), normalizer=normalizers.NFC())
    with pytest.warns(UserWarning, match="does not normalize text"):
        assert tokenizer_metadata(nfc, 97)["tokenizer.ggml.pre"] == "qwen2"
    llama3 = byte_level(pre_tokenizer=split(qwen2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")))
    with pytest.raises(ModelError, match="ignore_merges: False"):
        tokenizer_metadata(llama3, 97)
    whole = json.loads(llama3.backend_tokenizer.to_str())
    whole["model"]["ignore_merges"] = True
    llama3 = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))
    assert tokenizer_metadata(llama3, 97)["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(set(PRE_TOKENIZERS.values())) == len(PRE_TOKENIZERS) == 5


def test_a_file_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    import gguf

    file = export_gguf(tiny_model("mamba2"), tmp_path / "student.gguf").path
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    assert fields["mamba2.vocab_size"].contents() == 97


def words() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def sentencepiece(drop: int = 0, **changes: Any) -> PreTrainedTokenizerFast:
    """Return a BPE with byte fallback as those of Llama 2; `drop` leaves out the last merges."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeht."]
    merges = [("t", "h"), ("▁", "t"), ("th", "e"), ("▁", "a"), ("▁t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "the")]
    table = {word: index for index, word in enumerate([*words, *dict.fromkeys(a + b for a, b in merges)])}
    kept = merges[: len(merges) - drop]
    tokenizer = Tokenizer(models.BPE(table, kept, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def joined_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """Return a text's tokens as llama.cpp's `llm_tokenizer_spm` finds them: the best-scored neighbours join first."""
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        able = [at for at in range(len(parts) - 1) if parts[at] + parts[at + 1] in ids]
        if not able:
            break
        best = max(able, key=lambda at: (scores[ids[parts[at] + parts[at + 1]]], -at))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [
        number
        for part in parts
        for number in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


def test_scores_of_sentencepiece_join_as_its_merges_do() -> None:
    tokenizer = sentencepiece()
    found: dict[str, Any] = tokenizer_metadata(tokenizer, 300)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[259] == 1 and types[299] == 5
    for text in ("the that a the", "thethe  bathed ate.", "a é the", ""):
        expected = joined_by_score(text, found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"])
        assert tokenizer(text)["input_ids"] == (expected if text else [])
    metaspace = {"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never", split=False)}
    assert tokenizer_metadata(sentencepiece(**metaspace), 300)["tokenizer.ggml.add_space_prefix"] is False
    metaspace["pre_tokenizer"] = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    with pytest.warns(UserWarning, match="a space before the text after a special token"):
        assert tokenizer_metadata(sentencepiece(**metaspace), 300)["tokenizer.ggml.add_space_prefix"] is True


def surrounded() -> PreTrainedTokenizerFast:
    around = processors.TemplateProcessing(single="<|end|> $A a", special_tokens=[("<|end|>", 0), ("a", 65)])
    return byte_level(post_processor=around)


REFUSED = {
    "a table of words": (words, "a tokenizer of type WordLevel"),
    "a merge that is not listed": (lambda: sentencepiece(drop=1), "no merge of '▁' and 'the'"),
    "another normalizer of SentencePiece": (lambda: sentencepiece(normalizer=normalizers.NFKC()), "NFKC"),
    "words of SentencePiece": (
        lambda: sentencepiece(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(split=True)),
        "the pre-tokenizer (.|\n)*'split': True",
    ),
    "another pre-tokenizer": (
        lambda: byte_level(pre_tokenizer=split(r"\d")),
        r"a pre-tokenizer \[(.|\n)*those of gpt-2",
    ),
    "a normalizer": (lambda: byte_level(normalizer=normalizers.Lowercase()), "a normalizer of type Lowercase"),
    "other tokens around a text": (surrounded, r"special tokens around a text: \[0, "),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_gguf_cannot_hold_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot hold this tokenizer(.|\n)*{message}"):
        export_gguf(tiny_model("llama", vocab_size=300), tmp_path / "student.gguf", make())
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_embeddings_and_tokens_that_strip() -> None:
    with pytest.raises(ModelError, match="token 96, 90 embeddings"):
        tokenizer_metadata(byte_level(), 90)
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", rstrip=True)])
    with pytest.warns(UserWarning, match="does not strip spaces around a token(.|\n)*<tool>"):
        tokenizer_metadata(tokenizer, 98)
