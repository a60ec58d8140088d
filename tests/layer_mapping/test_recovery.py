"""Students whose layers are rotated, rescaled, noisy copies of teacher layers are mapped back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from xarch_kd.layer_mapping import build_layer_map
from xarch_kd.ops.similarity import LayerSimilarity

TEACHER_LAYERS, TOKENS, BATCHES, WIDTH, STUDENT_WIDTH = 8, 64, 3, 16, 24


def measured(copied: Sequence[int], seed: int, noise: float) -> Tensor:
    """Debiased CKA [student layers, teacher layers]; teacher layers are a residual stream, each near its neighbors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rotations = [torch.linalg.qr(draw(STUDENT_WIDTH, WIDTH)).Q.T * 10 ** (place - 2) for place in range(len(copied))]
    sums = LayerSimilarity()
    for _ in range(BATCHES):
        updates = draw(TEACHER_LAYERS, TOKENS, WIDTH)
        updates[1:] *= 0.7
        teacher = updates.cumsum(0)
        noisy = [teacher[layer] + noise * draw(TOKENS, WIDTH) for layer in copied]
        sums.update([layer @ rotation for layer, rotation in zip(noisy, rotations, strict=True)], list(teacher))
    return sums.result().total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strategy", ["cka", "monotone"])
def test_copies_in_order_are_found(strategy: str, seed: int) -> None:
    copied = [1, 2, 5, 7]
    similarity = measured(copied, seed, noise=0.3)
    found = build_layer_map(strategy, 4, TEACHER_LAYERS, similarity=similarity)
    assert found.pairs() == tuple((student, teacher, 1.0) for student, teacher in enumerate(copied))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("entropy", [0.0, 0.05])
def test_transport_gives_each_student_layer_all_of_the_layer_it_copies(entropy: float, seed: int) -> None:
    copied = [1, 2, 5, 7]
    options = {"entropy": entropy}
    similarity = measured(copied, seed, noise=0.3)
    found = build_layer_map("optimal_transport", 4, TEACHER_LAYERS, similarity=similarity, options=options)
    for student, teacher in enumerate(copied):
        row = found.weights[student]
        # Each of 8 teacher layers holds 1/8 and each student layer needs 1/4: half of a row at most.
        assert row[teacher].item() == pytest.approx(row.max().item()) and row[teacher].item() > 0.4


@pytest.mark.parametrize("strategy", ["cka", "optimal_transport"])
def test_copies_out_of_order_are_found(strategy: str) -> None:
    copied = [3, 0, 6, 1, 7, 5, 2, 4]
    found = build_layer_map(strategy, 8, TEACHER_LAYERS, similarity=measured(copied, 0, noise=0.3))
    # Exact transport of equal shares, divided by the shares.
    assert found.weights.argmax(1).tolist() == copied
    assert found.weights.max(1).values.tolist() == pytest.approx([1.0] * 8)


def test_order_finds_copies_that_single_matches_miss() -> None:
    # Enough noise that the map by maximum is not monotone.
    copied = [0, 2, 4, 6, 7]
    gained = 0
    for seed in range(4):
        similarity = measured(copied, seed, noise=12.0)
        distances = [
            sum(abs(teacher - right) for (_, teacher, _), right in zip(found.pairs(), copied, strict=True))
            for found in (build_layer_map(name, 5, 8, similarity=similarity) for name in ("cka", "monotone"))
        ]
        assert distances[1] <= distances[0]
        gained += distances[1] < distances[0]
    assert gained > 0
