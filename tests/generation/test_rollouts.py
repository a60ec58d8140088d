"""Rollouts: what is continued, which tokens count, and the replay buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.generation.replay import ReplayBuffer
from xarch_kd.generation.rollouts import Row, batch_of, prompts_of, roll_out
from xarch_kd.generation.sampling import Sampling, sample
from xarch_kd.testing.tiny import tiny_model

IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 0, 0, 0]]
MASK = [[True] * 8, [True] * 5 + [False] * 3]


def row(*ids: int) -> Row:
    return Row(ids=torch.tensor(ids), counts=torch.ones(len(ids), dtype=torch.bool))


@pytest.mark.parametrize("answers_from", [None, 3])
def test_a_row_counts_the_same_tokens_whether_it_is_data_or_was_sampled(answers_from: int | None) -> None:
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    labels = None
    if answers_from is not None:
        labels = ids.masked_fill(~mask, -100)
        labels[:, :answers_from] = -100
    data = Batch(input_ids=ids, attention_mask=mask, labels=labels, origin="data")
    prompts = prompts_of(data, 4)
    assert [len(prompt.ids) for prompt in prompts] == [answers_from or 4] * 2
    rest = [
        row[len(prompt.ids) :][kept[len(prompt.ids) :]] for row, kept, prompt in zip(ids, mask, prompts, strict=True)
    ]
    sampled = [
        Row(ids=torch.cat((prompt.ids, own)), counts=torch.cat((prompt.counts, torch.ones(len(own), dtype=torch.bool))))
        for prompt, own in zip(prompts, rest, strict=True)
    ]
    found = batch_of(sampled, origin="sampled")
    assert found.fingerprint == data.fingerprint
    assert torch.equal(found.next_tokens, data.next_tokens)
    assert (found.tokens, found.labelled_tokens, found.predictions) == (
        data.tokens,
        data.labelled_tokens,
        data.predictions,
    )
    # The token that ends the answer is predicted, the padding after it is not.
    assert found.next_tokens[1].tolist()[3:] == [24, -100, -100, -100, -100]


def test_prompts_end_in_their_first_document_and_leave_a_token_to_continue() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    packed = Batch(input_ids=ids, position_ids=positions, origin="packed")
    assert [prompt.ids.tolist() for prompt in prompts_of(packed, 4)] == [[5, 6], [11, 12, 13, 14]]
    assert [prompt.ids.tolist() for prompt in prompts_of(packed, 9)] == [[5, 6], [11, 12, 13, 14, 15]]
    labels = torch.tensor([[5, 6, 7, 8, 9, 10], [-100, -100, -100, -100, -100, 16]])
    answers = Batch(input_ids=ids, labels=labels, origin="answers")
    assert [prompt.counts.tolist() for prompt in prompts_of(answers, 2)] == [[True, True], [False] * 5]
    empty = Batch(input_ids=ids, attention_mask=torch.tensor([[True] * 6, [False] * 6]), origin="a row without a token")
    rows, figures = roll_out(
        tiny_model("llama"), prompts_of(empty, 2), Sampling(max_new_tokens=3), seeds=[1, 2], end_of_sequence=[]
    )
    assert [len(found.ids) for found in rows] == [5, 0] and figures.rows == 1
    assert batch_of(rows, origin="sampled").tokens == 5


def test_figures_count_ends_and_repetitions() -> None:
    model = tiny_model("llama")
    # A head without a preference: greedy decoding repeats token 0.
    torch.nn.init.zeros_(model.get_output_embeddings().weight)  # type: ignore[union-attr, arg-type]
    prompts, greedy = [row(5, 6), row(7, 8)], Sampling(max_new_tokens=8, temperature=0)
    _, repeated = roll_out(model, prompts, greedy, seeds=[0, 0], end_of_sequence=[])
    assert (repeated.rows, repeated.tokens, repeated.ended, repeated.runs, repeated.distinct) == (2, 16, 0, 10, 2)
    rows, ended = roll_out(model, prompts, greedy, seeds=[0, 0], end_of_sequence=[0])
    assert (ended.tokens, ended.ended, ended.distinct_4) == (2, 2, 1.0)
    assert [found.ids.tolist() for found in rows] == [[5, 6, 0], [7, 8, 0]]
    assert all(found.counts.all() for found in rows)


def test_min_p_and_a_smaller_vocabulary_leave_out_what_they_say() -> None:
    model = tiny_model("llama")
    many = sample(model, [[5]] * 64, Sampling(max_new_tokens=1), seed=list(range(64)), end_of_sequence=[], vocabulary=7)
    drawn = many.input_ids[:, 1]
    assert drawn.max() < 7 and len(drawn.unique()) > 2
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1)
    likely = sample(
        model, [[5]] * 64, Sampling(max_new_tokens=1, min_p=0.5), seed=list(range(64)), end_of_sequence=[]
    ).input_ids[:, 1]
    assert len(likely.unique()) > 1
    assert (probabilities[likely] >= 0.5 * probabilities.max()).all()
    with pytest.raises(UsageError, match="min_p"):
        Sampling(max_new_tokens=1, min_p=1.5)


def test_the_buffer_is_the_same_after_saving_and_forgets_by_age_and_capacity(tmp_path: Path) -> None:
    buffer = ReplayBuffer(capacity=2, max_age=3)
    assert buffer.is_empty(0)
    for step, ids in enumerate(([1], [2, 3], [4, 5, 6])):
        buffer.put([row(*ids), row(*ids, 9)], step=step)
    assert len(buffer) == 4
    assert {tuple(found.ids.tolist()) for found in buffer.draw(40, step=5, seed=0)} == {(4, 5, 6), (4, 5, 6, 9)}
    assert buffer.is_empty(6)
    buffer.save(tmp_path / "buffer.safetensors")
    again = ReplayBuffer(capacity=2, max_age=3)
    again.load([tmp_path / "buffer.safetensors"], rank=0, ranks=1)
    for own, other in zip(buffer.draw(9, step=4, seed=7), again.draw(9, step=4, seed=7), strict=True):
        assert torch.equal(own.ids, other.ids) and torch.equal(own.counts, other.counts)
    # Two files are shared out anew over one process, and over three.
    paths = [tmp_path / "buffer.safetensors"] * 2
    again.load(paths, rank=0, ranks=1)
    assert len(again) == 8
    again.load(paths, rank=2, ranks=3)
    assert len(again) == 2
    (tmp_path / "buffer.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError):
        again.load([tmp_path / "buffer.safetensors"], rank=0, ranks=1)
