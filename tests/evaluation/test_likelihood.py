"""Likelihoods streamed over the vocabulary equal those of the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xarch_kd.data.documents import TokenizedDocuments
from xarch_kd.data.packing import Packing, pack
from xarch_kd.errors import DataError, NonFiniteLoss, UsageError
from xarch_kd.evaluation.likelihood import perplexity, position_buckets, position_curve, token_nll
from xarch_kd.evaluation.likelihood_suite import token_fingerprint
from xarch_kd.testing.tiny import VOCABULARY, tiny_model


def rows(count: int = 5, length: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "bamba", "mamba2"])
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(2, 7), (8, None)])
def test_it_equals_the_models_own_logits(family: str, batch_size: int, chunk_size: int | None) -> None:
    model, ids = tiny_model(family), rows()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    found = token_nll(model, ids, batch_size=batch_size, chunk_size=chunk_size)
    assert found.shape == (5, 11) and found.dtype == torch.float32
    # Three blocks in float32 with another batch size, hence another order of sums.
    torch.testing.assert_close(found, expected.view(5, 11), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bamba"])
def test_only_tokens_that_count_are_measured(family: str) -> None:
    """Padding and tokens that labels leave out are NaN; documents that a row isolates are measured alone."""
    documents = TokenizedDocuments.of(
        [rows(1, length)[0].tolist() for length in (5, 9, 4, 12)],
        [[index >= length // 2 for index in range(length)] for length in (5, 9, 4, 12)],
    )
    model = tiny_model(family)
    alone = [token_nll(model, torch.from_numpy(documents.ids(number).astype("int64"))[None])[0] for number in range(4)]
    expected = torch.cat([nll[documents.lengths[number] // 2 - 1 :] for number, nll in enumerate(alone)])
    kinds: tuple[tuple[Packing, bool], ...] = (("none", False), ("best_fit", True))
    for packing, isolated in kinds:
        packed = pack(documents, 16, packing=packing, isolated=isolated)
        batches = [packed.batch([row], origin="a test") for row in range(len(packed))]
        found = token_nll(model, batches)
        assert found.shape[0] == 4
        kept = found[~found.isnan()]
        torch.testing.assert_close(kept.sort().values, expected.sort().values, rtol=1e-5, atol=1e-5)
        one = [packed.batch(range(len(packed)), origin="a test")]
        together = token_nll(model, one)
        torch.testing.assert_close(
            together[~together.isnan()].sort().values, expected.sort().values, rtol=1e-5, atol=1e-5
        )
        assert token_fingerprint(one) == token_fingerprint(batches)
        assert token_fingerprint(one) != token_fingerprint([pack(documents, 15).batch([0, 1], origin="a test")])


def test_text_of_which_nothing_counts_is_refused() -> None:
    documents = TokenizedDocuments.of([[1, 2, 3]], [[True, False, False]])
    batches = [pack(documents, 8, packing="none").batch([0], origin="a test")]
    with pytest.raises(DataError, match=r"too little text[\s\S]*3 tokens, none of which is to be predicted"):
        token_nll(tiny_model("llama"), batches)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    first, second = token_nll(model, rows()), token_nll(model, rows())
    assert torch.equal(first, second), "dropout is off while it is measured"
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a floating-point tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_logits_of_a_batch_are_made() -> None:
    vocabulary = 4000
    model = tiny_model("llama", vocab_size=vocabulary)
    with Largest() as largest:
        token_nll(model, rows(8, 33), batch_size=8, chunk_size=16)
    # The head itself is the largest tensor: 4000 x 64.
    assert largest.elements <= vocabulary * 64 < 8 * 32 * vocabulary


def test_progress_counts_tokens() -> None:
    seen: list[int] = []
    token_nll(tiny_model("llama"), rows(), batch_size=2, progress=seen.append)
    assert seen == [read * rows().shape[1] for read in (2, 4, 5)]


def test_position_curve_doubles() -> None:
    assert position_buckets(1) == ((1, 2),)
    assert position_buckets(11) == ((1, 2), (2, 4), (4, 8), (8, 12))
    nll = torch.arange(1.0, 12.0).repeat(3, 1)
    assert position_curve(nll) == (1.0, 2.5, 5.5, 9.5)


def test_perplexity_is_infinite_rather_than_an_error() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == float("inf")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(3, 1, dtype=torch.long), ["too little text", "[3, 1]"]),
        (torch.zeros(0, 8, dtype=torch.long), ["too little text"]),
        (torch.zeros(8, dtype=torch.long), ["packed rows", "[8]"]),
        (torch.zeros(2, 8), ["packed rows", "float32"]),
        (torch.full((2, 8), VOCABULARY), ["outside the model's vocabulary", "97", "0 to 96"]),
        (torch.full((2, 8), -100), ["outside the model's vocabulary", "-100"]),
    ],
)
def test_bad_rows_are_refused(ids: Tensor, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        token_nll(tiny_model("llama"), ids)
    for word in words:
        assert word in str(caught.value)


def test_a_broken_model_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3, 3] = float("nan")
    with pytest.raises(NonFiniteLoss, match="row 0, token 1"):
        token_nll(model, rows())
    with pytest.raises(UsageError, match="batch_size"):
        token_nll(tiny_model("llama"), rows(), batch_size=0)
