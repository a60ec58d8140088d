"""`xarch-kd data`: figures of known texts, and rows whose labels are visible."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.cli.conftest import XarchKd
from xarch_kd.cli.data import print_source
from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.packing import pack
from xarch_kd.job.data_report import DataReport, LengthBin, source_report
from xarch_kd.testing.mapping import LOGIT_STAGE
from xarch_kd.testing.tiny import tiny_tokenizer

# One token per character, and one that ends each document.
QUESTION, ANSWER = "Who? ", "Me."


def mapping_file(tmp_path: Path, teacher: Path, **data: Any) -> Path:
    path = tmp_path / "mapping.yaml"
    content = {
        "version": 1,
        "teacher": {"model": str(teacher)},
        "student": {"convert": {"mixer": "mamba2", "replace": [1]}},
        "device": "cpu",
        "data": {"sequence_length": 16, **data},
        "stages": [LOGIT_STAGE],
    }
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))
    return path


def jsonl(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_the_figures_of_each_source_of_a_mixture(tmp_path: Path, teacher: Path, xarch_kd: XarchKd) -> None:
    few = jsonl(tmp_path / "few.jsonl", "abc", "abc", "x" * 20)
    more = jsonl(tmp_path / "more.jsonl", *(f"text {number}" for number in range(8)))
    mixture = [{"files": [few], "weight": 1}, {"files": [more], "weight": 3}]
    mapping = mapping_file(tmp_path, teacher, mixture=mixture, held_out=0, packing="best_fit")
    done = xarch_kd("data", mapping, "--json", "--rows", "1")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["sequence_length"], report["packing"], report["isolated"]) == (16, "best_fit", False)
    first, second = report["sources"]
    assert (first["weight"], second["weight"]) == (0.25, 0.75)
    assert (first["documents"], first["tokens"], first["repeated"], first["longer"]) == (3, 29, 1, 1)
    assert (second["documents"], second["tokens"], second["repeated"], second["longer"]) == (8, 56, 0, 0)
    assert first["counted"] is None and first["held_out"] == 0
    assert [(each["low"], each["high"], each["documents"]) for each in first["lengths"]] == [
        (4, 7, 2),
        (8, 15, 0),
        (16, 31, 1),
    ]
    assert second["waste"] == 1 / 8 and len(second["first_rows"]) == 1
    assert second["first_rows"][0][0]["text"].count("<|end|>") == 2
    printed = xarch_kd("data", mapping, "--rows", "0").out
    assert "75% of the rows drawn" in printed and "56 tokens in 8 documents" in printed
    assert "1 documents repeat the content of another (33.3%)" in printed
    assert "1 documents are longer than a row of 16 tokens" in printed
    assert "row 0" not in printed


def test_held_out_documents_are_counted_apart(tmp_path: Path, teacher: Path, xarch_kd: XarchKd) -> None:
    files = [jsonl(tmp_path / "text.jsonl", *(f"text {number:03}" for number in range(100)))]
    (source,) = json.loads(xarch_kd("data", mapping_file(tmp_path, teacher, files=files), "--json").out)["sources"]
    assert source["documents"] + source["held_out"] == 100 and source["held_out"] > 0
    assert source["tokens"] == 9 * source["documents"]


def test_completions_are_marked_in_the_rows_of_a_run(tmp_path: Path, teacher: Path, xarch_kd: XarchKd) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps({"prompt": QUESTION, "completion": ANSWER}) + "\n") * 4)
    options = {"files": [str(path)], "held_out": 0, "packing": "best_fit", "documents": "isolated"}
    done = xarch_kd("data", mapping_file(tmp_path, teacher, sequence_length=18, **options))
    assert done.code == 0, done.err
    assert "44.4% of the tokens are to be predicted (16)" in done.out
    assert done.out.count("Who? ⟦Me.<|end|>⟧┃Who? ⟦Me.<|end|>⟧\n") == 2


def test_an_error_of_the_file_is_that_of_a_run(tmp_path: Path, teacher: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("data", mapping_file(tmp_path, teacher, files=[str(tmp_path / "none.txt")]))
    assert done.code in (2, 3) and "none.txt" in done.err


@pytest.mark.parametrize(
    ("color", "isolated", "row"),
    [
        (False, True, "Who? ⟦Me.<|end|>⟧┃Who? ⟦Me.<|end|>⟧"),
        (False, False, "Who? ⟦Me.<|end|>⟧Who? ⟦Me.<|end|>⟧"),
        (True, False, "\x1b[2mWho? \x1b[0m\x1b[32mMe.<|end|>\x1b[0m\x1b[2mWho? \x1b[0m\x1b[32mMe.<|end|>\x1b[0m"),
    ],
    ids=["isolated", "joined", "colored"],
)
def test_what_is_to_be_predicted_is_visible(color: bool, isolated: bool, row: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer(QUESTION)["input_ids"], *tokenizer(ANSWER)["input_ids"], tokenizer.eos_token_id]
    counted = [False] * len(QUESTION) + [True] * (len(ANSWER) + 1)
    documents = TokenizedDocuments.of([ids, ids, ids[:5]], counted=[counted, counted, counted[:5]])
    packed = pack(documents, 18, packing="best_fit", isolated=isolated)
    source = source_report(packed, tokenizer, rows=1)
    assert (source.counted, source.uncounted_documents, source.repeated) == (8, 1, 1)
    assert source.lengths == (
        LengthBin(low=4, high=7, documents=1, tokens=5),
        LengthBin(low=8, high=15, documents=2, tokens=18),
    )
    written = io.StringIO()
    console = Console(file=written, width=100, force_terminal=color, color_system="standard" if color else None)
    print_source(
        source, DataReport(sequence_length=18, packing="best_fit", isolated=isolated, sources=(source,)), console
    )
    assert "34.8% of the tokens are to be predicted (8); 1 documents have none" in written.getvalue()
    assert row in written.getvalue().splitlines()
