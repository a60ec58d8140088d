"""Rows that pack several documents are read as if each document stood alone, or refused."""

from __future__ import annotations

import pytest
import torch

from xarch_kd.data.batches import Batch
from xarch_kd.errors import TapError
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.testing.tiny import tiny_model

IDS = torch.randint(2, 97, (1, 10), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
SITE = Site("hidden", 2)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    reader = TeacherFeatures(layout_of(tiny_model(model_type)), [SITE])
    packed = reader.read(Batch(input_ids=IDS, position_ids=POSITIONS))[SITE]
    apart = [reader.read(Batch(input_ids=ids))[SITE] for ids in (IDS[:, :4], IDS[:, 4:])]
    padded = reader.read(
        Batch(input_ids=IDS, position_ids=POSITIONS, attention_mask=(torch.arange(10) < 9)[None]),
    )[SITE]
    torch.testing.assert_close(padded[:, :9], torch.cat(apart, 1)[:, :9], rtol=1e-4, atol=1e-5)  # type: ignore[index, arg-type]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert not torch.allclose(packed[:, 4:], reader.read(Batch(input_ids=IDS))[SITE][:, 4:], atol=1e-3)  # type: ignore[index]


def test_packed_rows_that_would_be_mixed_are_refused() -> None:
    recurrent = TeacherFeatures(layout_of(tiny_model("mamba2")), [SITE])
    with pytest.raises(TapError, match=r"packed row would be mixed[\s\S]*mamba2"):
        recurrent.read(Batch(input_ids=IDS, position_ids=POSITIONS))
