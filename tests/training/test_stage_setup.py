"""Setup of a student for a stage."""

from __future__ import annotations

import pytest
import torch

from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.stage_setup import CPU_CHUNK, cpu_chunks


@pytest.mark.parametrize("tokens", [CPU_CHUNK - 3, 2 * CPU_CHUNK + 5])
def test_short_chunks_compute_the_same_and_end_with_the_block(tokens: int) -> None:
    student = tiny_model("mamba2", chunk_size=256)
    mixer = next(part for part in student.modules() if hasattr(part, "A_log"))
    ids = torch.randint(student.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student(ids).logits
        with pytest.raises(KeyError), cpu_chunks(student):
            assert mixer.chunk_size == CPU_CHUNK < student.config.chunk_size
            torch.testing.assert_close(student(ids).logits, expected, rtol=0, atol=1e-4)
            raise KeyError
    assert mixer.chunk_size == student.config.chunk_size
