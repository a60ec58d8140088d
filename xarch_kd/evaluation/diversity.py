"""Suite `diversity`: whether a student writes texts as different from each other as its teacher's, and as likely.

All numbers depend on the number and length of texts, so both models' texts are cut to one length and one number, and
the teacher's second set of texts gives the value that the same comparison has without a student.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import torch

from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.corpus_metrics import DIFFERENCES, MEASURES, Array, Corpus, Ids, features
from xarch_kd.evaluation.cost import Cost, sampling_cost
from xarch_kd.evaluation.frontiers import area, frontier, histograms, neighbor_measures
from xarch_kd.evaluation.intervals import Interval, subsampling
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.rollouts import Continuations, sampled, values_of
from xarch_kd.evaluation.statistics import paired_bootstrap
from xarch_kd.evaluation.suite_result import Curve, Figure, SuiteResult, finite, line, signature_text

VERSION: Final = 1
FEWEST_TEXTS: Final = 4
SHORTEST: Final = 4
DRAWS: Final = 50
FRONTIER: Final = "divergence frontier (area)"
COMPRESSION: Final = "compression ratio"
# Texts below which the frontier of two sets hardly depends on what is in them.
FEW_TEXTS: Final = 500


def equal_texts(*sets: Continuations) -> tuple[Ids, ...]:
    """Return texts [texts, tokens] of all sets, of one number and one length, from the same prompts.

    The length is that which keeps most tokens: longer texts are cut, and prompts with a shorter text in some set are
    left out. Raises NotMeasured for fewer than 4 texts of 4 tokens.
    """
    lengths = torch.stack([each.alive.sum(1) for each in sets]).min(0).values
    length = max(range(lengths.max() + 1), key=lambda size: size * int((lengths >= size).sum()))
    chosen = lengths >= length
    if int(chosen.sum()) < FEWEST_TEXTS or length < SHORTEST:
        raise NotMeasured(
            "too few texts of both models are long enough to compare",
            found=f"{int(chosen.sum())} of {len(chosen)} texts of {length} tokens",
            allowed=f"at least {FEWEST_TEXTS} of {SHORTEST} tokens",
        )
    return tuple(each.written[chosen, :length].numpy() for each in sets)


def compare_texts(
    real: Ids, other: Ids, *, vocabulary: int, level: float, seed: int, draws: int = DRAWS
) -> dict[str, tuple[float, float, Interval]]:
    """Return the value of each measure on both sets of texts, and student over or minus teacher with its interval.

    Both are [texts, tokens] of one shape, row by row from the same prompts; other shapes raise NotMeasured. Intervals
    are those of `draws` subsamples of prompts without replacement, unknown for 0 draws.
    """
    _check_sizes(real, other)
    corpora = [Corpus(texts, vocabulary) for texts in (real, other)]
    is_difference = np.array([name in DIFFERENCES for name in MEASURES])

    def values(index: Ids) -> Array:
        return np.array([[measure(corpus, index) for measure in MEASURES.values()] for corpus in corpora])

    def compared(index: Ids) -> Array:
        first, second = values(index)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(is_difference, second - first, second / first)

    both = values(np.arange(len(real)))
    found = subsampling(compared, len(real), draws=draws, level=level, seed=seed)
    return {
        name: (float(both[0, column]), float(both[1, column]), found[column]) for column, name in enumerate(MEASURES)
    }


def compare_sets(real: Ids, other: Ids, *, level: float, seed: int, draws: int = DRAWS) -> dict[str, Interval]:
    """Return the area of the divergence frontier, precision, recall, density and coverage of two sets of texts.

    Raises NotMeasured as `compare_texts`, whose `draws` these are.
    """
    _check_sizes(real, other)
    first, second = features(real), features(other)

    def values(index: Ids) -> Array:
        one, two = first[index], second[index]
        return np.array([area(*frontier(*histograms(one, two, seed))), *neighbor_measures(one, two).values()])

    names = [FRONTIER, *neighbor_measures(first, second)]
    return dict(zip(names, subsampling(values, len(real), draws=draws, level=level, seed=seed), strict=True))


def _check_sizes(real: Ids, other: Ids) -> None:
    if real.shape != other.shape:
        raise NotMeasured("sets of texts of other sizes cannot be compared", found=f"{real.shape} and {other.shape}")


def measure_diversity(subjects: Subjects) -> SuiteResult:
    """Return the diversity of both models' texts, and how likely each model finds the other's.

    Raises NotMeasured for models that cannot write, and for texts of which too few are long enough.
    """
    main = subjects.rollouts
    again = sampled(subjects, "teacher", subjects.prompts, subjects.new_tokens, seeds=_other_seeds(subjects))
    teacher, student, second = equal_texts(main.teacher, main.student, again)
    vocabulary = min(len(layout.head_weight) for layout in subjects.layouts)
    compare = functools.partial(compare_texts, vocabulary=vocabulary, level=subjects.level, seed=subjects.seed)
    sets = functools.partial(compare_sets, level=subjects.level, seed=subjects.seed)
    figures = list(_single(compare(teacher, student), compare(teacher, second, draws=0), len(teacher)))
    figures += _compression(subjects, teacher, student, second)
    figures += _pairs(sets(teacher, student), sets(teacher, second, draws=0), len(teacher))
    figures += _cross_table(subjects)
    x, y = frontier(*histograms(features(teacher), features(student), subjects.seed))
    notices = [
        f"{len(teacher)} texts of {teacher.shape[1]} tokens of each model; all numbers depend on both, so compare them "
        "with the teacher's own and with its second set of texts only"
    ]
    if len(teacher) < FEW_TEXTS:
        notices.append(f"the divergence frontier of fewer than {FEW_TEXTS} texts is biased; its ceiling is too")
    settings = {
        "texts": len(teacher),
        "tokens": teacher.shape[1],
        "prompt": subjects.prompts.shape[1],
        "decoding": "T1",
        "features": "hashed 1-3-grams",
        "interval": f"half of n {subjects.level:g}",
        "seed": subjects.seed,
    }
    return SuiteResult(
        signature=signature_text("diversity", VERSION, settings),
        figures=tuple(figures),
        curves=(
            Curve(
                name="divergence frontier",
                x="texts of the student's kind (1: all are the teacher's)",
                at=tuple(map(float, x)),
                lines={"student": line(y)},
            ),
        ),
        notices=tuple(notices),
    )


def diversity_cost(subjects: Subjects) -> Mapping[str, Cost]:
    """Return the work: continuations of both models, and the teacher's second set."""
    prompts, width = subjects.prompts.shape
    tokens = subjects.new_tokens
    again = sampling_cost(prompts, width, tokens, read_by_both=False)
    return {
        "rollouts": sampling_cost(prompts, width, tokens),
        # By one of the two models.
        "second set": Cost(read=again.read // 2, steps=again.steps // 2),
    }


def _other_seeds(subjects: Subjects) -> list[int]:
    return [subjects.seed + len(subjects.prompts) + index for index in range(len(subjects.prompts))]


def _single(
    found: dict[str, tuple[float, float, Interval]], ceiling: dict[str, tuple[float, float, Interval]], count: int
) -> Iterator[Figure]:
    for name, (teacher, student, interval) in found.items():
        yield Figure(
            name=name,
            better="teacher",
            compared="difference" if name in DIFFERENCES else "ratio",
            teacher=teacher,
            student=student,
            value=finite(interval.value),
            low=finite(interval.low),
            high=finite(interval.high),
            ceiling=finite(ceiling[name][2].value),
            count=count,
            of="texts",
        )


def _pairs(found: dict[str, Interval], ceiling: dict[str, Interval], count: int) -> list[Figure]:
    return [
        Figure(
            name=name,
            better="teacher",
            compared="value",
            value=finite(each.value),
            low=finite(each.low),
            high=finite(each.high),
            ceiling=finite(ceiling[name].value),
            count=count,
            of="texts",
        )
        for name, each in found.items()
    ]


def _compression(subjects: Subjects, teacher: Ids, student: Ids, second: Ids) -> list[Figure]:
    """Return the compression ratio of each set as text, none without a tokenizer."""
    if subjects.tokenizer is None:
        return []
    ratios = []
    for texts in (teacher, student, second):
        data = "\n".join(map(str, subjects.tokenizer.batch_decode(texts))).encode("utf-8")
        ratios.append(len(data) / len(zlib.compress(data, 9)))
    return [
        Figure(
            name=COMPRESSION,
            better="teacher",
            compared="ratio",
            teacher=ratios[0],
            student=ratios[1],
            value=ratios[1] / ratios[0],
            ceiling=ratios[2] / ratios[0],
            count=len(teacher),
            of="texts",
        )
    ]


def _cross_table(subjects: Subjects) -> list[Figure]:
    """Return how likely each model finds the texts of each: NLL per token, with intervals over prompts."""
    figures = []
    for writer in ("teacher", "student"):
        found: Continuations = getattr(subjects.rollouts, writer)
        values = values_of(found)
        nll = [torch.where(found.alive, values[f"{side}_nll"], torch.nan) for side in ("teacher", "student")]
        kept = found.alive.any(1)
        gap = paired_bootstrap(
            nll[0][kept], nll[1][kept], level=subjects.level, resamples=subjects.resamples, seed=subjects.seed
        )
        figures.append(
            Figure(
                name=f"NLL of what the {writer} wrote",
                better="lower" if writer == "teacher" else "teacher",
                compared="difference",
                unit="nats per token",
                teacher=float(nll[0].nanmean()),
                student=float(nll[1].nanmean()),
                value=gap.mean,
                low=gap.low,
                high=gap.high,
                p_value=gap.p_value,
                ceiling=0.0,
                count=gap.clusters,
            )
        )
    return figures
