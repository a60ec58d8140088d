from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from xarch_kd.errors import ModelError
from xarch_kd.models.loading.tokens import shared_vocabulary, token_fingerprint
from xarch_kd.testing.tiny import tiny_tokenizer


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    table = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, unk_token=words[0])))


def test_equal_tables_share_every_row() -> None:
    assert shared_vocabulary(tiny_tokenizer(), tiny_tokenizer(), 97, 97) == 97
    assert token_fingerprint(tiny_tokenizer()) == token_fingerprint(tiny_tokenizer())


@pytest.mark.parametrize(("teacher_rows", "student_rows", "shared"), [(128, 97, 97), (112, 128, 112)])
def test_padded_rows_are_cut_off_with_a_warning(teacher_rows: int, student_rows: int, shared: int) -> None:
    with pytest.warns(UserWarning, match=f"Only the first {shared} of {teacher_rows} teacher and {student_rows}"):
        assert shared_vocabulary(tiny_tokenizer(), tiny_tokenizer(), teacher_rows, student_rows) == shared


def test_tokens_that_one_side_has_at_its_end_are_cut_off_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Only the first 97 of 97 teacher and 99 student"):
        assert shared_vocabulary(tiny_tokenizer(), tiny_tokenizer(99), 97, 99) == 97


def test_a_permuted_table_of_equal_size_is_refused_and_the_first_difference_named() -> None:
    teacher, student = tokenizer_of(["a", "b", "c"]), tokenizer_of(["a", "c", "b"])
    with pytest.raises(ModelError, match=r"2 ids stand for different tokens(.|\n)*id 1: teacher 'b', student 'c'"):
        shared_vocabulary(teacher, student, 3, 3)
    assert token_fingerprint(teacher) != token_fingerprint(student)


def test_a_model_with_fewer_rows_than_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="fewer output rows"):
        shared_vocabulary(tiny_tokenizer(), tiny_tokenizer(), 97, 90)
