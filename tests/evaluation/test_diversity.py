"""Diversity: each measure against its definition, sizes that differ, and a sampler that collapsed to five texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from xarch_kd.evaluation import rollouts
from xarch_kd.evaluation.corpus_metrics import (
    Corpus,
    adjusted_distinct,
    distinct,
    entropy,
    features,
    self_bleu,
    self_repetition,
    vendi,
)
from xarch_kd.evaluation.diversity import FRONTIER, compare_texts, equal_texts
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.frontiers import area, frontier, histograms, neighbor_measures
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.results import from_json, to_json
from xarch_kd.evaluation.rollouts import Continuations
from xarch_kd.evaluation.sizes import Size
from xarch_kd.testing.markov import never_ending
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

TEXTS = np.random.default_rng(0).integers(0, 6, size=(7, 12))
EVERYTHING = np.arange(7)
SIZE = Size(prompts=24, prompt_tokens=4, new_tokens=12, unconditional=4, swaps=(0.5,), probe_tokens=64)


def grams(text: Sequence[int], order: int) -> list[tuple[int, ...]]:
    return [tuple(text[start : start + order]) for start in range(len(text) - order + 1)]


def test_counts_are_those_of_the_definitions() -> None:
    corpus, texts = Corpus(TEXTS, 6), TEXTS.tolist()
    for order in (1, 2, 3, 4):
        pooled = [gram for text in texts for gram in grams(text, order)]
        assert distinct(corpus, EVERYTHING, order) == pytest.approx(len(set(pooled)) / len(pooled))
        shares = [count / len(pooled) for count in Counter(pooled).values()]
        plain = -sum(share * math.log(share) for share in shares)
        expected = plain + (len(shares) - 1) / (2 * len(pooled))
        assert entropy(corpus, EVERYTHING, order) == pytest.approx(expected)
        within = [1 - len(set(grams(text, order))) / len(grams(text, order)) for text in texts]
        assert corpus.within_repetition(order) == pytest.approx(within)
    pooled_tokens = [token for text in texts for token in text]
    assert adjusted_distinct(corpus, EVERYTHING) == pytest.approx(
        len(set(pooled_tokens)) / (6 * (1 - (5 / 6) ** len(pooled_tokens)))
    )
    elsewhere = [
        sum(Counter(grams(other, 2))[gram] for gram in set(grams(text, 2)) for other in texts if other is not text)
        for text in texts
    ]
    assert self_repetition(corpus, EVERYTHING, 2) == pytest.approx(float(np.log1p(elsewhere).mean()))


def bleu(text: list[int], references: list[list[int]]) -> float:
    logs, missing = [], 0
    for order in (1, 2, 3, 4):
        own = Counter(grams(text, order))
        most = {gram: max(Counter(grams(other, order))[gram] for other in references) for gram in own}
        matched = sum(min(count, most[gram]) for gram, count in own.items())
        total = len(text) - order + 1
        missing += matched == 0
        logs.append(math.log(matched / total if matched else 1 / (2**missing * total)))
    return math.exp(sum(logs) / 4)


def test_self_bleu_is_the_mean_bleu_against_all_other_texts() -> None:
    texts = TEXTS.tolist()
    expected = [bleu(text, texts[:index] + texts[index + 1 :]) for index, text in enumerate(texts)]
    assert self_bleu(Corpus(TEXTS, 6), EVERYTHING) == pytest.approx(float(np.mean(expected)))
    assert self_bleu(Corpus(np.tile(TEXTS[:1], (3, 1)), 6), np.arange(3)) == pytest.approx(1.0)


def test_vendi_counts_different_texts() -> None:
    assert vendi(np.eye(5)) == pytest.approx(5.0)
    assert vendi(np.eye(5)[[0, 0, 1, 1, 1, 1]]) == pytest.approx(
        math.exp(-(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)))
    )
    vectors = features(TEXTS)
    # The same eigenvalues as those of the features' own covariance.
    values = np.linalg.eigvalsh(vectors.T @ vectors / 7)
    values = values[values > 1e-12]
    assert vendi(vectors) == pytest.approx(math.exp(-(values * np.log(values)).sum()))


def test_the_frontier_of_two_clusters() -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(40, 3)) * 0.01
    far = real + 100
    p, q = histograms(real, far, 0)
    # 8 clusters, of which each set has its own; half an observation in every cluster.
    assert p.sum() == pytest.approx(1) and q.sum() == pytest.approx(1)
    apart, same = area(*frontier(p, q)), area(*frontier(p, p))
    assert same == pytest.approx(1.0) and apart < 0.2
    x, y = frontier(np.array([0.75, 0.25]), np.array([0.25, 0.75]))
    middle = math.exp(-5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert x[13] == pytest.approx(middle) and y[13] == pytest.approx(middle)


def test_neighbors_by_brute_force() -> None:
    generator = np.random.default_rng(1)
    real, other = generator.normal(size=(15, 2)), generator.normal(size=(15, 2)) + 0.8
    found = neighbor_measures(real, other, neighbors=3)

    def ball(points: Any, index: int) -> float:
        return sorted(float(np.linalg.norm(points[index] - each)) for each in points)[3]

    inside = [[np.linalg.norm(one - two) <= ball(real, index) for two in other] for index, one in enumerate(real)]
    reached = [[np.linalg.norm(one - two) <= ball(other, index) for index, two in enumerate(other)] for one in real]
    assert found["precision"] == pytest.approx(np.any(inside, 0).mean())
    assert found["recall"] == pytest.approx(np.any(reached, 1).mean())
    assert found["density"] == pytest.approx(np.sum(inside) / (3 * 15))
    assert found["coverage"] == pytest.approx(np.any(inside, 1).mean())


def continuations(lengths: Sequence[int]) -> Continuations:
    ids = torch.arange(len(lengths) * 8).view(-1, 8)
    alive = torch.arange(8) < torch.tensor(lengths)[:, None]
    return Continuations(prompt=0, ids=ids, alive=alive, ended=alive.sum(1) < 8)


def test_texts_are_cut_to_one_length_and_other_sizes_are_refused() -> None:
    first, second = equal_texts(continuations([8, 8, 8, 8, 2]), continuations([6, 7, 8, 8, 8]))
    assert first.shape == second.shape == (4, 6)
    assert (first == np.arange(32).reshape(4, 8)[:, :6]).all()
    with pytest.raises(NotMeasured, match="too few texts"):
        equal_texts(continuations([8, 8, 8, 2, 2]), continuations([2, 8, 8, 8, 8]))
    with pytest.raises(NotMeasured, match="other sizes"):
        compare_texts(TEXTS, TEXTS[:, :9], vocabulary=6, level=0.95, seed=0)


def collapsed(templates: int) -> Any:
    """Return `rollouts.sampled` with a student that writes one of its first few texts, whatever the prompt."""
    sampled = rollouts.sampled

    def sample(subjects: Any, side: str, prompts: torch.Tensor, tokens: int, **options: Any) -> Continuations:
        found = sampled(subjects, side, prompts, tokens, **options)
        if side == "student":
            found.ids[:, found.prompt :] = found.written[:templates].repeat(len(prompts), 1)[: len(prompts)]
        return found

    return sample


def test_a_sampler_that_collapsed_is_found_here_and_by_no_other_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = never_ending(tiny_model("llama", eos_token_id=None))
    rows = torch.randint(2, 97, (24, 8), generator=torch.Generator().manual_seed(0))
    for name in ("rollouts", "exposure"):
        monkeypatch.setattr(f"xarch_kd.evaluation.{name}.sampled", collapsed(5))
    found = compare_models(
        model,
        model,
        {"text": rows},
        suites=["likelihood", "exposure", "diversity"],
        size=SIZE,
        tokenizer=tiny_tokenizer(),
    )
    assert from_json(to_json(found)) == found
    diversity = found.results["diversity"]
    assert diversity.figure("different texts").student == pytest.approx(5 / 24)
    for name in ("distinct-2", "distinct-4", "different texts", "Vendi score"):
        figure = diversity.figure(name)
        assert figure.high < 0.8 < figure.ceiling, "the teacher's second set is nearer"
    blind = diversity.figure("repetition within texts (4-grams)")
    assert blind.value == pytest.approx(0.0, abs=0.02), "each text on its own is as good as before"
    assert diversity.figure("self-BLEU").low > 0.3
    assert diversity.figure(FRONTIER).value < diversity.figure(FRONTIER).ceiling
    assert found.result("text").difference == 0.0
    assert {figure.value for figure in found.results["exposure"].figures} == {0.0}


def test_a_student_equal_to_its_teacher_writes_the_same_texts() -> None:
    model = never_ending(tiny_model("llama", eos_token_id=None))
    rows = torch.randint(2, 97, (8, 8), generator=torch.Generator().manual_seed(0))
    found = compare_models(model, model, {"text": rows}, suites=["diversity"], size=SIZE).results["diversity"]
    for figure in found.figures:
        if figure.compared != "value":
            assert figure.value in (1.0, 0.0, None) and figure.teacher == figure.student
