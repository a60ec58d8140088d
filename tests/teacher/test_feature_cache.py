"""Cached teacher features belong to one teacher and one text, whatever batch number they had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from xarch_kd.data.batches import Batch
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import DiskCache, FeatureCache, MemoryCache
from xarch_kd.teacher.reader import TeacherFeatures, teacher_fingerprint
from xarch_kd.testing.tiny import tiny_model

SITE = Site("hidden", 1)
IDS = torch.randint(2, 97, (2, 8), generator=torch.Generator().manual_seed(0))
LONG = torch.ones_like(IDS, dtype=torch.bool)
SHORT = LONG.clone()
SHORT[1, 5:] = False


def _fine_tuned() -> PreTrainedModel:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1 + 2**-20)
    return model


def _with(**attributes: Any) -> PreTrainedModel:
    return tiny_model("llama", **attributes)


def test_the_fingerprint_is_of_weights_and_config_and_not_of_the_place(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    own = teacher_fingerprint(layout_of(model))
    assert teacher_fingerprint(layout_of(loaded)) == own
    others = [tiny_model("llama", seed=1), _fine_tuned(), _with(rms_norm_eps=1e-4), tiny_model("llama").bfloat16()]
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    found = {teacher_fingerprint(layout_of(other)) for other in [*others, eager]}
    assert len(found | {own}) == 6


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_another_text_mask_or_teacher_is_never_read_from_a_cache(kind: str, tmp_path: Path) -> None:
    cache: FeatureCache = MemoryCache() if kind == "memory" else DiskCache(tmp_path)
    batches = [
        Batch(input_ids=IDS, origin="batch 0"),
        Batch(input_ids=IDS.flip(0), origin="batch 0"),
        Batch(input_ids=IDS, attention_mask=SHORT, origin="batch 0"),
    ]
    for model in (tiny_model("llama"), _fine_tuned()):
        layout = layout_of(model)
        passes: list[int] = []
        layout.blocks[0].register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        fresh = [TeacherFeatures(layout, [SITE]).read(batch)[SITE] for batch in batches]
        reader = TeacherFeatures(layout, [SITE], cache)
        for _ in range(2):
            for batch, expected in zip(batches, fresh, strict=True):
                found = reader.read(batch)[SITE]
                assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
                assert torch.equal(found, expected)
        # Each was read live once without a cache and once with it, and came from the cache after that.
        assert len(passes) == 2 * len(batches)
    if kind == "disk":
        assert len(list(tmp_path.iterdir())) == 2 * len(batches)
        damaged, copied, *_ = sorted(tmp_path.iterdir())
        assert cache.get(damaged.stem) is not None
        content = damaged.read_bytes()
        copied.write_bytes(content)
        flipped = bytearray(content)
        flipped[-5] ^= 1
        assert cache.get(copied.stem) is None
        for wrong in (bytes(flipped), content[:100], b""):
            damaged.write_bytes(wrong)
            assert cache.get(damaged.stem) is None
