"""Problems of inputs that a plan reports before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from xarch_kd.errors import DataError, MappingFileError, ModelError
from xarch_kd.models.loading.load import load_tokenizer
from xarch_kd.models.loading.tokens import check_rows, check_same_ids
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.input_checks import table_of_positions
from xarch_kd.planning.models import ModelHandle
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.mapping import GOOD, LOGIT_STAGE
from xarch_kd.testing.tiny import tiny_config, tiny_tokenizer

FolderOf = Callable[..., str]
PlanOf = Callable[[str], Plan]

HIDDEN: dict[str, Any] = {
    "name": "hidden",
    "steps": 2,
    "train": ["all"],
    "align": [{"name": "hidden", "tap": "hidden", "layers": "same", "loss": {"kind": "relative_mse"}}],
    "optimizer": {"lr": 1e-3},
}


def with_tokenizer(folder: str, edit: Callable[[dict[str, Any]], None] | None = None, size: int = 97) -> str:
    """Save a tiny tokenizer of `size` tokens into a model's folder, after an edit of its tokenizer.json."""
    tiny_tokenizer(size).save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    if edit is not None:
        edit(content)
    file.write_text(json.dumps(content))
    return folder


def other_type(content: dict[str, Any]) -> None:
    content["model"]["type"] = "NewKind"


def other_version(content: dict[str, Any]) -> None:
    content["version"] = "2.0"


def other_step(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "NewKind"}


def swapped(content: dict[str, Any]) -> None:
    table = content["model"]["vocab"]
    table["a"], table["b"] = table["b"], table["a"]


def lowercased(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def missing_inside(content: dict[str, Any]) -> None:
    del content["model"]["vocab"]["q"]


@pytest.mark.parametrize("edit", [other_type, other_version, other_step])
def test_a_tokenizer_file_of_another_version_is_named(
    folder_of: FolderOf, plan_of: PlanOf, edit: Callable[[dict[str, Any]], None]
) -> None:
    folder = with_tokenizer(folder_of("llama"), edit)
    message = r"tokenizer\.json cannot be read by tokenizers \d(.|\n)*newer version: pip install -U"
    with pytest.raises(ModelError, match=r"map\.yaml:3:10: teacher\.model: (.|\n)*" + message):
        plan_of(GOOD.replace("./teacher", folder))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder)


def test_more_tokens_than_rows_are_refused(folder_of: FolderOf, plan_of: PlanOf) -> None:
    folder = with_tokenizer(folder_of("llama"), size=99)
    message = r"more tokens than the embedding of the teacher has rows(.|\n)*99 tokens, 97 rows"
    with pytest.raises(ModelError, match=message):
        plan_of(GOOD.replace("./teacher", folder))
    with pytest.raises(ModelError, match="99 tokens, 97 rows"):
        check_rows(load_tokenizer(folder), 97, side="teacher")
    check_rows(load_tokenizer(folder), 99, side="teacher")


def test_a_fresh_student_has_a_row_for_each_token(folder_of: FolderOf, rates: Rates) -> None:
    folder = with_tokenizer(folder_of("llama"))
    mapping = {
        **yaml.safe_load(GOOD.replace("./teacher", folder)),
        "student": {"config": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 90}},
        "stages": [HIDDEN],
    }
    with pytest.raises(ModelError, match=r"embedding of the student has rows(.|\n)*97 tokens, 90 rows"):
        make_plan(mapping, rates=rates)


@pytest.mark.parametrize(("positions", "length", "is_refused"), [(64, 128, True), (64, 65, True), (64, 64, False)])
def test_rows_longer_than_learned_positions_are_refused(
    folder_of: FolderOf, rates: Rates, positions: int, length: int, is_refused: bool
) -> None:
    content = yaml.safe_load(GOOD.replace("./teacher", folder_of("gpt2", n_positions=positions)))
    content["student"] = {"config": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}}
    content["data"]["sequence_length"] = length
    content["stages"] = [HIDDEN]
    if not is_refused:
        assert make_plan(content, rates=rates).teacher.model_type == "gpt2"
        return
    with pytest.raises(MappingFileError, match=r"data\.sequence_length: .*the 64 positions that the teacher \(gpt2\)"):
        make_plan(content, rates=rates)


@pytest.mark.parametrize(("model_type", "positions"), [("gpt2", 512), ("opt", 512), ("llama", None), ("mamba2", None)])
def test_tables_of_positions(model_type: str, positions: int | None) -> None:
    handle = ModelHandle.of(model_type, tiny_config(model_type), None, "float32")
    assert table_of_positions(handle) == positions


def test_a_device_that_is_not_there_is_refused(
    folder_of: FolderOf, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MappingFileError, match=r"device: cuda cannot be used by this torch(.|\n)*device: cpu"):
        plan_of(GOOD.replace("./teacher", folder_of("llama")) + "device: cuda\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  builtin: python-docs", "  files: [absent/*.txt]"),
        ("  builtin: python-docs", "  mixture: [{builtin: licences, weight: 1}, {files: [absent/*.txt], weight: 1}]"),
        ("{builtin: licences}", "{files: [absent/*.txt]}"),
    ],
)
def test_text_files_that_are_not_there_are_refused(folder_of: FolderOf, plan_of: PlanOf, old: str, new: str) -> None:
    with pytest.raises(DataError, match=r"absent/\*\.txt"):
        plan_of(GOOD.replace("./teacher", folder_of("llama")).replace(old, new))


UNLIKE: list[tuple[dict[str, Any], Callable[[dict[str, Any]], None], str]] = [
    (LOGIT_STAGE, swapped, r"2 of them do not stand for the same token(.|\n)*teacher 'a', student 'b'"),
    (HIDDEN, swapped, r"2 of them do not stand for the same token(.|\n)*teacher 'a', student 'b'"),
    (HIDDEN, missing_inside, "1 of them do not stand for the same token"),
    (HIDDEN, lowercased, r"cuts text in another way(.|\n)*teacher 'T' 'h' 'e'(.|\n)*student 't' 'h' 'e'"),
]


@pytest.mark.parametrize(("stage", "edit", "message"), UNLIKE, ids=["tokens", "hidden", "missing", "lower case"])
def test_a_student_that_reads_other_tokens_is_refused_with_the_reason(
    folder_of: FolderOf, rates: Rates, stage: dict[str, Any], edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    teacher = with_tokenizer(folder_of("llama"))
    student = with_tokenizer(folder_of("mamba2"), edit)
    content = yaml.safe_load(GOOD.replace("./teacher", teacher))
    content |= {"student": {"model": student}, "stages": [{**stage, "train": ["all"]}]}
    with pytest.raises(ModelError, match=r"student\.model: .*" + message) as raised:
        make_plan(content, rates=rates)
    assert "align features only" not in str(raised.value)
    # With the teacher's tokenizer named as the student's it is allowed.
    content["student"] = {"model": student, "tokenizer": teacher}
    assert make_plan(content, rates=rates).student.model_type == "mamba2"


def test_added_tokens_and_templates_are_the_students_own() -> None:
    student = tiny_tokenizer()
    student.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    student.chat_template = "{{ messages[0].content }}"
    check_same_ids(tiny_tokenizer(), student, 98)
    check_same_ids(student, tiny_tokenizer(), 98)
    with pytest.raises(ModelError, match="98 tokens, 97 rows"):
        check_same_ids(student, tiny_tokenizer(), 97)
    with pytest.raises(ModelError, match="98 tokens, 97 rows"):
        check_same_ids(tiny_tokenizer(), student, 97)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("lengths: [256, 4096]", r"map.yaml:\d+:\d+: evaluate.speed.lengths: 4,096 is beyond the 512 positions of the"),
        ("memory_gib: 1e-5", r"evaluate.speed.memory_gib: 10,737 bytes do not hold one sequence of 256 tokens"),
        ("lengths: [256, 256]", r"lengths must increase, found 256, 256"),
    ],
)
def test_lengths_and_memory_of_the_evaluation_fit_the_models(
    folder_of: FolderOf, plan_of: PlanOf, settings: str, message: str
) -> None:
    text = GOOD.replace("./teacher", folder_of("llama")).replace("evaluate:\n", f"evaluate:\n  speed: {{{settings}}}\n")
    with pytest.raises(MappingFileError, match=message):
        plan_of(text)
