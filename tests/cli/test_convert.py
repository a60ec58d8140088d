"""`xarch-kd convert`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import XarchKd
from xarch_kd.cli.convert import selection
from xarch_kd.errors import UsageError
from xarch_kd.models.conversion.convert import convert
from xarch_kd.testing.tiny import tiny_model


def test_a_converted_folder_loads_as_a_stock_model(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    output = tmp_path / "student"
    done = xarch_kd("convert", teacher, "--replace", "1", "--output", output)
    assert done.code == 0, done.err
    student = AutoModelForCausalLM.from_pretrained(output)
    assert type(student).__name__ == "GraniteMoeHybridForCausalLM"
    assert student.config.layer_types == ["full_attention", "linear_attention", "full_attention"]
    assert (
        AutoTokenizer.from_pretrained(output)("abc")["input_ids"]
        == AutoTokenizer.from_pretrained(teacher)("abc")["input_ids"]
    )
    assert done.out.startswith(f"{output}: GraniteMoeHybridForCausalLM, ")


def test_sizes_that_a_server_needs_are_options(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    output = tmp_path / "student"
    given = ("--expand", "2", "--no-proj-bias", "--n-groups", "1")
    done = xarch_kd("convert", teacher, "--replace", "1", "--output", output, *given)
    assert done.code == 0, done.err
    config = AutoModelForCausalLM.from_pretrained(output).config
    assert (config.mamba_expand, config.mamba_proj_bias, config.mamba_n_groups) == (2, False, 1)


def test_exactly_one_selection(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    for options in ([], ["--replace", "1", "--keep-attention", "all"]):
        done = xarch_kd("convert", teacher, "--output", tmp_path / "student", *options)
        assert done.code == 2
        assert "Exactly one of --keep-attention and --replace" in done.err


def test_the_old_spelling_of_an_option_names_the_new_one(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("convert", teacher, "--replace", "1", "--output", tmp_path / "s", "--initialisation", "random")
    assert done.code == 2
    assert "the option '--initialisation' is now spelled '--init'" in done.err
    assert "--init random" in done.err
    with pytest.raises(UsageError, match="argument 'initialisation' is now spelled 'init'"):
        convert(tiny_model("llama"), replace=[1], initialisation="random")  # type: ignore[call-arg]


def test_an_output_that_holds_something_is_left_alone(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = xarch_kd("convert", teacher, "--replace", "1", "--output", tmp_path)
    assert done.code == 2
    assert "is not an empty folder" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_block_out_of_range_is_a_usage_error(teacher: Path, tmp_path: Path, xarch_kd: XarchKd) -> None:
    done = xarch_kd("convert", teacher, "--replace", "1,3", "--output", tmp_path / "student")
    assert done.code == 2
    assert "3" in done.err and "0 to 2" in done.err
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(("text", "value"), [(None, None), ("every 4", "every 4"), ("6", [6]), (" 0, 4,8", [0, 4, 8])])
def test_selection(text: str | None, value: object) -> None:
    assert selection(text) == value
