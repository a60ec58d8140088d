"""Attention bridge: queries and keys of any mixing, through trainable maps outside of the models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.bridge import QueriesAndKeys, attention_bridge, bridge_dims, queries_and_keys
from xarch_kd.mixing import BandedMixing, DeltaMixing, LinearMixing, Mixing, SelectiveMixing, SoftmaxMixing, SSDMixing
from xarch_kd.projectors import LinearProjector

BATCH, TIME = 2, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(BATCH, TIME, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixings() -> dict[str, tuple[Mixing, Tensor, Tensor]]:
    """Each mixing with the queries and keys that belong to it, of unequal shapes where it allows that."""
    q, k, c, b = normal(0, 4, 6), normal(1, 2, 6), normal(2, 2, 3), normal(3, 2, 3)
    heads, decay = normal(4, 4), -normal(5, 4).abs()
    return {
        "softmax": (SoftmaxMixing(query=q, key=k, scale=1.0), q, k),
        "linear": (LinearMixing(query=q, key=k), q, k),
        "delta": (
            DeltaMixing(query=q, key=q / q.norm(dim=-1, keepdim=True), beta=heads.sigmoid()),
            q,
            q / q.norm(dim=-1, keepdim=True),
        ),
        "ssd": (SSDMixing(C=c, B=b, log_decay=decay, dt=heads.abs()), c, b),
        "selective": (
            SelectiveMixing(C=c[:, :, 0], B=b[:, :, 0], dt=heads.abs(), A=-torch.ones(4, 3).double()),
            c[:, :, :1],
            b[:, :, :1],
        ),
    }


@pytest.mark.parametrize("kind", mixings())
def test_queries_and_keys_of_every_mixing(kind: str) -> None:
    mixing, query, key = mixings()[kind]
    found = queries_and_keys(mixing)
    assert torch.equal(found.query, query) and torch.equal(found.key, key)


def test_a_convolution_has_none() -> None:
    with pytest.raises(UsageError, match=r"(?s)neither queries and keys nor C and B.*banded.*softmax \| linear"):
        queries_and_keys(BandedMixing(taps=torch.ones(3, 4), row_scale=torch.ones(BATCH, TIME, 3)))


def sides() -> tuple[QueriesAndKeys, QueriesAndKeys]:
    student = QueriesAndKeys(normal(2, 2, 3).requires_grad_(), normal(3, 2, 3).requires_grad_())
    return student, QueriesAndKeys(normal(0, 4, 6), normal(1, 2, 6))


def maps() -> tuple[LinearProjector, LinearProjector]:
    dims = bridge_dims(*sides())
    assert dims == {"query": (6, 24), "key": (6, 12)}
    query, key = (
        LinearProjector(*dims[name], generator=torch.Generator().manual_seed(at)).double()
        for at, name in enumerate(("query", "key"))
    )
    return query, key


def test_it_is_the_mean_of_two_distances_through_their_maps_and_trains_both_sides() -> None:
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 3:] = False
    (student, teacher), (query_map, key_map) = sides(), maps()
    loss = attention_bridge(
        student, teacher, normalizer=mask.sum(), query_map=query_map, key_map=key_map, mask=mask, kind="mse"
    )
    loss.backward()
    (own, _), (again_query, again_key) = sides(), maps()
    expected = torch.zeros((), dtype=torch.float64)
    for x, t, weight in zip(own, teacher, (again_query.weight, again_key.weight), strict=True):
        gap = torch.einsum("btd,ed->bte", x.reshape(BATCH, TIME, 6), weight) - t.reshape(BATCH, TIME, -1)
        expected = expected + ((gap**2).mean(-1) * mask).sum() / mask.sum() / 2
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    pairs = ((student.query, own.query), (student.key, own.key))
    for mine, theirs in (*pairs, (query_map.weight, again_query.weight), (key_map.weight, again_key.weight)):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-14)


def test_micro_batches_add_up() -> None:
    (student, teacher), (query_map, key_map) = sides(), maps()
    options: dict[str, Any] = {"normalizer": BATCH * TIME, "query_map": query_map, "key_map": key_map}
    whole = attention_bridge(student, teacher, **options)
    halves = [
        attention_bridge(
            QueriesAndKeys(*(x[at : at + 1] for x in student)),
            QueriesAndKeys(*(t[at : at + 1] for t in teacher)),
            **options,
        )
        for at in range(BATCH)
    ]
    torch.testing.assert_close(torch.stack(halves).sum(), whole, rtol=1e-13, atol=0)


def test_what_a_map_can_undo_is_not_seen() -> None:
    (student, teacher), (query_map, key_map) = sides(), maps()
    before = attention_bridge(student, teacher, normalizer=10.0, query_map=query_map, key_map=key_map)
    turn = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    turned = QueriesAndKeys(*((x.flatten(2) @ turn).unflatten(2, (2, 3)) for x in student))
    assert abs(attention_bridge(turned, teacher, normalizer=10.0, query_map=query_map, key_map=key_map) - before) > 0.1
    with torch.no_grad():
        for projector in (query_map, key_map):
            projector.weight.copy_(projector.weight @ torch.linalg.inv(turn).T)
    after = attention_bridge(turned, teacher, normalizer=10.0, query_map=query_map, key_map=key_map)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=0)


def test_equal_queries_and_keys_need_no_map_and_have_no_loss() -> None:
    _, teacher = sides()
    assert attention_bridge(teacher, teacher, normalizer=10.0) == 0


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = sides()
    with pytest.raises(UsageError, match="one normalizer"):
        attention_bridge(student, teacher, normalizer=1.0, kind="relative_mse")
    with pytest.raises(UsageError, match="differ in dim"):
        attention_bridge(student, teacher, normalizer=1.0)
