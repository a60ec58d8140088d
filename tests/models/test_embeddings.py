"""Transfer of embeddings against a singular value decomposition by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from xarch_kd.errors import ModelError
from xarch_kd.models.embeddings import leading_directions, transfer_embeddings
from xarch_kd.models.loading.load import fresh_model
from xarch_kd.testing.tiny import tiny_config, tiny_model

ROWS = 97


def llama(width: int, **changes: Any) -> PreTrainedModel:
    return fresh_model(tiny_config("llama", hidden_size=width, num_hidden_layers=1, **changes), seed=3)


def uneven(**changes: Any) -> PreTrainedModel:
    """A teacher of width 64 whose embedding and head have directions of unlike lengths, and unlike each other."""
    model = tiny_model("llama", seed=5, num_hidden_layers=1, **changes)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight *= torch.logspace(0, -1, 64) + 0.3 * torch.randn(
                64, generator=torch.Generator().manual_seed(1)
            )
            module.weight += 0.2
    return model


def weights(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    modules: Any = model.get_input_embeddings(), model.get_output_embeddings()
    return modules[0].weight.detach().clone(), modules[1].weight.detach().clone()


def best_products(matrix: Tensor, width: int) -> NDArray[np.float64]:
    """The products of rows after the best approximation of `matrix` by one of rank `width`: U S² Uᵀ, cut off."""
    left, values, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (left[:, :width] * values[:width] ** 2) @ left[:, :width].T


def check_projection(got: Tensor, teacher: Tensor, own: Tensor, rows: int = ROWS) -> None:
    """Products of rows are the best ones up to one factor, and the mean square is that of the replaced rows."""
    products = (got[:rows].double() @ got[:rows].double().T).numpy()
    expected = best_products(teacher[:rows], own.shape[1])
    factor = np.trace(products) / np.trace(expected)
    # The student's rows are rounded to float32 once: each product is off by a few eps of the rows' lengths.
    tolerance = 8 * torch.finfo(torch.float32).eps * float(np.trace(products))
    np.testing.assert_allclose(products, factor * expected, rtol=0, atol=tolerance)
    assert float(got[:rows].norm()) == pytest.approx(float(own[:rows].norm()), rel=1e-6)
    assert torch.equal(got[rows:], own[rows:])


def test_a_narrower_tied_student_gets_the_best_projection_of_the_embedding() -> None:
    teacher, student = uneven(), llama(24, tie_word_embeddings=True)
    before, _ = weights(student)
    (done,) = transfer_embeddings(teacher, student, rows=ROWS)
    embedding, head = weights(student)
    check_projection(embedding, weights(teacher)[0], before)
    assert torch.equal(embedding, head)
    values = np.linalg.svd(weights(teacher)[0].double().numpy(), compute_uv=False) ** 2
    assert (done.part, done.teacher_dim, done.student_dim) == ("embedding", 64, 24)
    assert done.kept == pytest.approx(values[:24].sum() / values.sum(), rel=1e-10)
    assert 0.5 < done.kept < 0.999


def test_an_untied_head_gets_the_teachers_head_by_directions_of_its_own() -> None:
    teacher, student = uneven(), llama(24, tie_word_embeddings=False)
    before = weights(student)
    done = transfer_embeddings(teacher, student, rows=ROWS)
    assert [part.part for part in done] == ["embedding", "head"]
    for got, source, own in zip(weights(student), weights(teacher), before, strict=True):
        check_projection(got, source, own)
    # Different matrices, different directions: neither is the other's.
    assert done[0].kept != done[1].kept


def test_an_untied_head_of_a_tied_teacher_is_its_embedding() -> None:
    teacher, student = uneven(tie_word_embeddings=True), llama(64, tie_word_embeddings=False)
    transfer_embeddings(teacher, student, rows=ROWS)
    embedding, head = weights(student)
    assert torch.equal(embedding, weights(teacher)[0]) and torch.equal(head, weights(teacher)[0])


def test_equal_widths_copy_and_a_wider_student_keeps_every_product() -> None:
    teacher = uneven()
    same, wide = llama(64, tie_word_embeddings=True), llama(80, tie_word_embeddings=True)
    transfer_embeddings(teacher, same, rows=ROWS)
    (done,) = transfer_embeddings(teacher, wide, rows=ROWS)
    assert torch.equal(weights(same)[0], weights(teacher)[0])
    assert torch.equal(weights(wide)[0][:, :64], weights(teacher)[0])
    assert not weights(wide)[0][:, 64:].any()
    assert (done.kept, done.scale) == (1.0, 1.0)


@pytest.mark.parametrize("width", [24, 64, 80])
@pytest.mark.parametrize("own_rows", [90, 110])
def test_rows_are_matched_by_token_and_the_others_keep_their_own(width: int, own_rows: int) -> None:
    teacher, student = uneven(), llama(width, tie_word_embeddings=True, vocab_size=own_rows)
    before, _ = weights(student)
    rows = min(own_rows, ROWS)
    transfer_embeddings(teacher, student, rows=rows)
    after, _ = weights(student)
    assert torch.equal(after[rows:], before[rows:])
    if width == 24:
        check_projection(after, weights(teacher)[0], before, rows)
    else:
        assert torch.equal(after[:rows, :64], weights(teacher)[0][:rows])


def test_it_is_the_same_twice_and_whatever_signs_the_decomposition_had(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = uneven()
    first, second = llama(24, tie_word_embeddings=True), llama(24, tie_word_embeddings=True)
    transfer_embeddings(teacher, first, rows=ROWS)
    decompose = torch.linalg.eigh

    def other_signs(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = decompose(matrix)
        return values, vectors * torch.where(torch.arange(len(values)) % 2 == 0, -1.0, 1.0)

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    transfer_embeddings(teacher, second, rows=ROWS)
    assert torch.equal(weights(first)[0], weights(second)[0])


def test_the_directions_are_orthonormal_and_in_order() -> None:
    matrix = weights(uneven())[0]
    directions, _ = leading_directions(matrix, 24)
    assert directions.dtype == torch.float64
    torch.testing.assert_close(directions.T @ directions, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    lengths = (matrix.double() @ directions).norm(dim=0)
    assert bool((lengths[:-1] >= lengths[1:]).all())


def test_bfloat16_teachers_are_projected_in_float64() -> None:
    teacher, student = uneven().to(torch.bfloat16), llama(24, tie_word_embeddings=True)  # type: ignore[arg-type]
    before, _ = weights(student)
    transfer_embeddings(teacher, student, rows=ROWS)
    check_projection(weights(student)[0], weights(teacher)[0].float(), before)


def test_more_rows_than_a_side_has_are_refused() -> None:
    with pytest.raises(ModelError, match="98 rows"):
        transfer_embeddings(uneven(), llama(24, vocab_size=120), rows=98)
