from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from xarch_kd.testing.tiny import SIZES, VOCABULARY, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("model_type", SIZES)
@torch.no_grad()
def test_a_tiny_model_is_the_same_for_the_same_seed_and_reads_its_past(model_type: str) -> None:
    model = tiny_model(model_type)
    assert model.config.model_type == model_type
    rows = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    logits = model(rows).logits
    assert logits.shape == (1, 20, VOCABULARY)
    assert torch.equal(tiny_model(model_type)(rows).logits, logits)
    assert not torch.equal(tiny_model(model_type, seed=1)(rows).logits, logits)
    changed = rows.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    moved = (model(changed).logits - logits).abs().amax(dim=-1)[0]
    assert float(moved[:10].max()) < 1e-4 < float(moved[12:].max())


def test_the_tokenizer_gives_back_ascii_text_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY
    text = "".join(map(chr, range(32, 127))) + "\n"
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one(text)["input_ids"]
        assert sorted(ids) == list(range(1, VOCABULARY))
        assert one.decode(ids) == text
        assert one("é")["input_ids"] == one("?")["input_ids"]


@pytest.mark.parametrize("size", [50, 97, 130])
def test_the_tokenizer_has_as_many_tokens_as_asked(size: int) -> None:
    assert len(tiny_tokenizer(size)) == size
