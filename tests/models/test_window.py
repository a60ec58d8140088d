"""Attention through a window with sinks: its logits, its cache, its student on disk, and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import xarch_kd as xkd
from xarch_kd.errors import ConversionError, MappingFileError, TapError
from xarch_kd.models.cache_size import cache_layers, cache_size, measured_size
from xarch_kd.models.conversion.convert import convert, plan_conversion
from xarch_kd.models.in_place.window import window_visible
from xarch_kd.models.loading.save import save_student
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.taps.layout import layout_of
from xarch_kd.testing.mapping import GOOD, LOGIT_STAGE, TEXT
from xarch_kd.testing.tiny import tiny_config, tiny_model, tiny_tokenizer

WINDOW, SINKS, TIME = 5, 2, 16
OPTIONS: dict[str, Any] = {"mixer": "window", "window": WINDOW, "sinks": SINKS}
# Type → the blocks with full attention that get a window.
TEACHERS = {"llama": [0, 2], "qwen2": [1], "qwen3": [0], "smollm3": [1, 3], "gpt2": [0, 1], "gpt_neox": [2]}
RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


def tokens(rows: int = 2, length: int = TIME) -> Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def student_of(teacher: PreTrainedModel, replace: list[int], **options: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(teacher, replace=replace, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher and its student with a window in blocks 0 and 2."""
    teacher = tiny_model("llama")
    return teacher, student_of(teacher, TEACHERS["llama"])


@pytest.mark.parametrize("model_type", TEACHERS)
@torch.no_grad()
def test_short_rows_have_the_teachers_logits_bit_for_bit(model_type: str) -> None:
    teacher = tiny_model(model_type)
    student = student_of(teacher, TEACHERS[model_type])
    short, longer = tokens(length=WINDOW + SINKS), tokens(length=WINDOW + SINKS + 1)
    assert torch.equal(student(short).logits, teacher(short).logits)
    differences = (student(longer).logits - teacher(longer).logits).abs().amax((0, 2))
    # The first token that does not see everything is the last one.
    assert differences[:-1].max() < 1e-5 < 1e-3 < differences[-1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@torch.no_grad()
def test_long_rows_are_those_of_a_masked_teacher_in_float64(model_type: str, implementation: str) -> None:
    """The teacher takes a mask [batch, 1, time, time], written out here; all its blocks have it."""
    teacher = tiny_model(model_type)
    student = student_of(teacher, list(range(teacher.config.num_hidden_layers)))
    seen = [[j <= i and (i - j < WINDOW or j < SINKS) for j in range(TIME)] for i in range(TIME)]
    mask = torch.zeros(TIME, TIME, dtype=torch.float64).masked_fill(~torch.tensor(seen), -1e30)
    teacher.double().set_attn_implementation("eager")
    expected = teacher(tokens(), attention_mask=mask.expand(2, 1, -1, -1)).logits
    student.set_attn_implementation(implementation)
    torch.testing.assert_close(student(tokens()).logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, teacher(tokens()).logits, atol=1e-2)


@pytest.mark.parametrize("pads", [0, 3])
@torch.no_grad()
def test_a_cache_of_bounded_size_gives_the_logits_of_one_pass(
    llama: tuple[PreTrainedModel, PreTrainedModel], pads: int
) -> None:
    _, student = llama
    ids, mask = tokens(), torch.ones(2, TIME, dtype=torch.long)
    mask[0, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts: list[torch.Tensor] = []
    cache: Any = None
    for start, stop in [(0, 4), (4, 9), *((index, index + 1) for index in range(9, TIME))]:
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        found = student(ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        parts.append(found.logits)
        cache = found.past_key_values
    # The row with padding, alone and without it.
    alone = student(ids[:1, pads:]).logits[0]
    torch.testing.assert_close(torch.cat(parts, 1)[0, pads:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(parts, 1)[1], student(ids).logits[1], rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        pads + SINKS + WINDOW - 1,
        TIME,
        pads + SINKS + WINDOW - 1,
    ]
    if pads == 0:
        assert 2 * cache_size(cache_layers(layout_of(student)), TIME, torch.float32) == measured_size(cache)


@torch.no_grad()
def test_generation_and_documents_in_one_row(llama: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    student: Any = llama[1]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = student.generate(tokens(), **options, use_cache=True)
    assert torch.equal(cached, student.generate(tokens(), **options, use_cache=False))
    first, second = tokens(1, 10), tokens(2, 9)[1:]
    row = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(10), torch.arange(9)))[None]
    apart = torch.cat((student(first).logits, student(second).logits), 1)
    logits = student(row, position_ids=positions, use_cache=False).logits
    # Blocks 0 and 2 see one document each; block 1 is separated by transformers, from the same positions.
    torch.testing.assert_close(logits, apart, rtol=1e-4, atol=1e-4)


def test_a_window_by_hand() -> None:
    found = window_visible(
        torch.arange(6), torch.arange(6), window=2, sinks=1, starts=torch.tensor([[0, 0, 0, 3, 3, 3]])
    )
    first = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert found.int().tolist() == [[line + [0] * 3 for line in first] + [[0] * 3 + line for line in first]]


@torch.no_grad()
def test_the_student_on_disk_loads_and_its_matrix_is_read_while_all_is_seen(
    llama: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    _, student = llama
    save_student(student, tiny_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    short = tokens(length=WINDOW + SINKS)
    dense = xkd.trace(student, short, taps=["mixing"], layers=[0])["mixing"][0].dense()
    assert dense.shape[-1] == WINDOW + SINKS
    with pytest.raises(TapError, match="masks in a way that a softmax mixing does not hold"):
        xkd.trace(student, tokens(), taps=["mixing"], layers=[0])


def test_a_mapping_file_trains_the_replaced_blocks(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("".join(f"{number}. {TEXT}" for number in range(40)))
    content = {
        "version": 1,
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"convert": {**OPTIONS, "replace": [0, 2]}},
        "data": {"files": [str(tmp_path / "text.txt")], "sequence_length": 16, "batch_size": 2},
        "device": "cpu",
        "stages": [{**LOGIT_STAGE, "steps": 2, "train": ["mixers"]}],
        "evaluate": {"suites": ["likelihood"], "tokens": 256},
    }
    plan = make_plan(content, rates=RATES)
    assert [row.replaced for row in plan.student.layers] == [True, False, True]
    file = tmp_path / "mapping.yaml"
    file.write_text(yaml.safe_dump(content))
    run = xkd.train(file, tmp_path / "run", console=Console(quiet=True))
    trained = AutoModelForCausalLM.from_pretrained(run.student).state_dict()
    before = tiny_model("llama").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, trained[name])}
    parts = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 2) for part in "qkvo"]
    assert changed == set(parts)


def test_what_has_no_window_is_refused(llama: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    config = tiny_config("llama")
    refused: list[tuple[dict[str, Any], str]] = [
        ({**OPTIONS, "target": "bamba"}, "No stock class has a window"),
        ({"mixer": "window"}, r"needs its length(.|\n)*window: 512 and sinks: 4"),
        ({"mixer": "mamba2", "window": 4}, "Only the mixer window has a window"),
    ]
    for options, message in refused:
        with pytest.raises(ConversionError, match=message):
            plan_conversion(config, replace=[1], **options)
    with pytest.raises(ConversionError, match=r"a window of its own in these blocks(.|\n)*in blocks 0"):
        plan_conversion(tiny_config("mistral", sliding_window=8), replace=[0], **OPTIONS)
    with pytest.raises(ConversionError, match=r"is not in the table of families(.|\n)*allowed: .*llama, qwen2"):
        plan_conversion(tiny_config("phi3"), replace=[0], **OPTIONS)
    teacher, student = llama
    with pytest.raises(ConversionError, match="keeps the teacher's weights"):
        student_of(teacher, [1], init="random")
    with pytest.raises(ConversionError, match="dynamic cache"):
        student(tokens(), past_key_values=StaticCache(config=student.config, max_cache_len=32))
    for changed, message in (
        ({"mixer": "window"}, "needs its length"),
        ({"mixer": "mamba2", "sinks": 2}, "window and sinks are keys of mixer: window"),
        ({**OPTIONS, "replace": {"budget": 1}}, "strategy: sensitivity measures new mixers alone"),
    ):
        content = yaml.safe_load(GOOD) | {"student": {"convert": {"replace": [1], **changed}}}
        with pytest.raises(MappingFileError, match=message):
            make_plan(content, rates=RATES)
