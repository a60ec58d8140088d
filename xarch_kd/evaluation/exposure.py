"""Suite `exposure`: how much more a student errs on text that it wrote itself than on its teacher's text.

The error of a step is the divergence of the two models' whole next-token distributions after the tokens so far, so
that the next token itself adds no variance (Rao-Blackwell; Amini, Vieira and Cotterell, arXiv 2504.10637). R(l) is its
sum over l steps of text that the student wrote, E(l) over text that the teacher wrote, each step averaged over the
texts that have not ended yet. The excess accumulated error is 100 (R(l) / E(l) - 1) % (Arora et al., arXiv 2204.01171).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from xarch_kd.evaluation.base import Subjects
from xarch_kd.evaluation.cost import Cost, sampling_cost
from xarch_kd.evaluation.refusal import NotMeasured
from xarch_kd.evaluation.rollouts import Continuations, Rollouts, first_token, sample_both, sampled, scored, values_of
from xarch_kd.evaluation.suite_result import Curve, Figure, SuiteResult, band, finite, line, signature_text

VERSION: Final = 1
# Texts that a step must have left; at most half of them, where there are few.
FEWEST_ALIVE: Final = 30
# Points of the curves by position.
POINTS: Final = 16
MEASURES: Final = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon",
    "total_variation": "total variation",
}

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Excess:
    """Accumulated errors by number of steps, each [steps]: R, E and 100 (R / E - 1), with its interval and p-value.

    `own` and `others` are the mean errors of the single steps, `alive` the texts left in the smaller set.
    """

    own: Array
    others: Array
    accumulated_own: Array
    accumulated_others: Array
    excess: Array
    low: Array
    high: Array
    p_value: Array
    alive: Array


def accumulated_excess(
    own: Array, own_alive: Array, others: Array, others_alive: Array, *, level: float = 0.95
) -> Excess:
    """Return the excess of errors `own` over errors `others` [texts, steps], row by row of the same prompts.

    `own_alive` and `others_alive` are 1 where a text has this step and 0 after its end. Steps are left out from the one
    on that too few texts have. The interval is that of log(R / E) by the delta method, with Student's t over prompts;
    it covers some 2 to 4 points less than its level for 128 prompts. Equal errors have excess 0 and p = 1.

    >>> import numpy as np
    >>> from xarch_kd.evaluation.exposure import accumulated_excess
    >>> errors, alive = np.full((8, 2), 0.1), np.ones((8, 2))
    >>> accumulated_excess(2 * errors, alive, errors, alive).excess.tolist()
    [100.0, 100.0]
    """
    texts = len(own)
    left = np.minimum(own_alive.sum(0), others_alive.sum(0))
    enough = left >= max(1.0, min(FEWEST_ALIVE, texts / 2))
    steps = len(left) if enough.all() else int(np.argmin(enough))
    if not steps:
        raise NotMeasured(
            "almost no text has a token", found=f"{texts} texts", allowed="text that does not end at once"
        )
    parts = [
        _accumulated(values[:, :steps], alive[:, :steps])
        for values, alive in ((own, own_alive), (others, others_alive))
    ]
    (own_mean, own_sum, own_pull), (other_mean, other_sum, other_pull) = parts
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = own_sum / other_sum
        pull = own_pull / own_sum - other_pull / other_sum
        error = pull.std(0, ddof=1) / np.sqrt(texts) if texts > 1 else np.full(steps, np.nan)
        deviation = np.log(ratio) / error
    # Where neither set has an error, there is none to accumulate.
    equal = (own_sum == 0) & (other_sum == 0) | ((ratio == 1) & (error == 0))
    ratio, error = np.where(equal, 1.0, ratio), np.where(equal, 0.0, error)
    factor = np.exp(stats.t.ppf((1 + level) / 2, max(1, texts - 1)) * error)
    p_value = np.where(equal, 1.0, 2 * stats.t.sf(np.abs(deviation), max(1, texts - 1)))
    return Excess(
        own=own_mean,
        others=other_mean,
        accumulated_own=own_sum,
        accumulated_others=other_sum,
        excess=100 * (ratio - 1),
        low=100 * (ratio / factor - 1),
        high=100 * (ratio * factor - 1),
        p_value=p_value,
        alive=left[:steps],
    )


def _accumulated(values: Array, alive: Array) -> tuple[Array, Array, Array]:
    """Return mean [steps], its running sum, and the influence of each text on that sum [texts, steps]."""
    count = alive.sum(0)
    mean = (values * alive).sum(0) / count
    influence = (values - mean) * alive * (len(values) / count)
    return mean, mean.cumsum(), influence.cumsum(1)


def measure_exposure(subjects: Subjects) -> SuiteResult:
    """Return the excess accumulated error of the student by length, after prompts, after none, and by swapped prefix.

    Raises NotMeasured for models that cannot write, and text without room for it.
    """
    main = subjects.rollouts
    found = {name: _excess(main, name, subjects.level) for name in MEASURES}
    figures = [_figure(each, f"excess accumulated error, {MEASURES[name]}", main) for name, each in found.items()]
    curves = list(_curves(found))
    notices = []
    first = first_token(subjects)
    if first is None:
        notices.append("no unconditional text: neither the tokenizer nor the teacher has a first token")
    else:
        start = subjects.prompts.new_full((subjects.size.unconditional, 1), first)
        alone = sample_both(subjects, start, subjects.new_tokens)
        figures.append(
            _figure(_excess(alone, "forward_kl", subjects.level), "excess without a prompt, forward KL", alone)
        )
    swaps = list(_swaps(subjects, main))
    figures += [
        _figure(each, f"excess after {length} own tokens in place of the teacher's, forward KL", main)
        for length, each in swaps
    ]
    if swaps:
        curves.append(
            Curve(
                name="prefix swap",
                x="tokens of prefix",
                unit="%",
                at=(0.0, *(float(length) for length, _ in swaps)),
                lines={"student": (0.0, *line(each.excess[-1] for _, each in swaps))},
                bands={
                    "student": (
                        (0.0, 0.0),
                        *band(*zip(*((each.low[-1], each.high[-1]) for _, each in swaps), strict=True)),
                    )
                },
            )
        )
    if len(subjects.prompts) < FEWEST_ALIVE:
        notices.append(
            f"{len(subjects.prompts)} prompts are fewer than {FEWEST_ALIVE}: intervals are wide, and too narrow "
            "where errors are skewed; give more text or --size standard"
        )
    return SuiteResult(
        signature=signature_text("exposure", VERSION, _settings(subjects)),
        figures=tuple(figures),
        curves=tuple(curves),
        notices=tuple(notices),
    )


def exposure_cost(subjects: Subjects) -> Mapping[str, Cost]:
    """Return the work: continuations of prompts, unconditional ones, and those of swapped prefixes."""
    prompts, width = subjects.prompts.shape
    tokens = subjects.new_tokens
    swapped = sampling_cost(prompts, width + tokens // 2, tokens // 4)
    return {
        "rollouts": sampling_cost(prompts, width, tokens),
        "unconditional": sampling_cost(subjects.size.unconditional, 1, tokens),
        "swaps": Cost(read=swapped.read * len(subjects.size.swaps), steps=swapped.steps * len(subjects.size.swaps)),
    }


def _settings(subjects: Subjects) -> dict[str, Any]:
    return {
        "prompts": len(subjects.prompts),
        "prompt": subjects.prompts.shape[1],
        "new": subjects.new_tokens,
        "unconditional": subjects.size.unconditional,
        "swaps": ",".join(map(str, subjects.size.swaps)),
        "decoding": "T1",
        "error": "exact",
        "end": "alive",
        "interval": f"delta-log {subjects.level:g}",
        "seed": subjects.seed,
    }


def _excess(rollouts: Rollouts, name: str, level: float) -> Excess:
    own, others = rollouts.student, rollouts.teacher
    return accumulated_excess(
        values_of(own)[name].numpy(),
        own.alive.double().numpy(),
        values_of(others)[name].numpy(),
        others.alive.double().numpy(),
        level=level,
    )


def _figure(found: Excess, name: str, rollouts: Rollouts) -> Figure:
    return Figure(
        name=f"{name}, {len(found.excess)} tokens",
        better="lower",
        compared="excess",
        unit="%",
        teacher=float(found.accumulated_others[-1]),
        student=float(found.accumulated_own[-1]),
        value=finite(float(found.excess[-1])),
        low=finite(float(found.low[-1])),
        high=finite(float(found.high[-1])),
        p_value=finite(float(found.p_value[-1])),
        ceiling=0.0,
        count=len(rollouts.teacher.ids),
    )


def _curves(found: Mapping[str, Excess]) -> Iterator[Curve]:
    forward = found["forward_kl"]
    at = tuple(float(step + 1) for step in range(len(forward.excess)))
    yield Curve(
        name="excess accumulated error",
        x="tokens",
        unit="%",
        at=at,
        lines={MEASURES[name]: line(each.excess) for name, each in found.items() if len(each.excess) == len(at)},
        bands={"forward KL": band(forward.low, forward.high)},
    )
    step = max(1, -(-len(at) // POINTS))
    starts = range(0, len(at), step)
    own = [forward.own[start : start + step].mean() for start in starts]
    others = [forward.others[start : start + step].mean() for start in starts]
    middle = tuple(float(np.mean(at[start : start + step])) for start in starts)
    yield Curve(
        name="error by position",
        x="tokens",
        unit="nats per token",
        at=middle,
        lines={"on the teacher's text": line(others), "on its own text": line(own)},
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(np.equal(own, others), 0.0, 100 * (np.divide(own, others) - 1))
    yield Curve(name="incremental excess error", x="tokens", unit="%", at=middle, lines={"student": line(ratio)})
    yield Curve(name="texts left", x="tokens", at=at, lines={"smaller set": line(forward.alive)})


def _swaps(subjects: Subjects, main: Rollouts) -> Iterator[tuple[int, Excess]]:
    """Yield lengths, and the excess of the steps after so many own tokens over those after as many of the teacher's."""
    tokens = main.teacher.alive.shape[1]
    for share in subjects.size.swaps:
        length = round(share * tokens)
        after = min(tokens - length, max(1, tokens // 4))
        if not 0 < length < tokens or not bool(main.teacher.alive[:, length].any()):
            continue
        swapped = _continued(subjects, main.teacher, length, after)
        own_alive = main.student.alive[:, length : length + after].double().numpy()
        own = values_of(main.student)["forward_kl"][:, length : length + after].numpy()
        try:
            yield (
                length,
                accumulated_excess(
                    own,
                    own_alive,
                    values_of(swapped)["forward_kl"].numpy(),
                    swapped.alive.double().numpy(),
                    level=subjects.level,
                ),
            )
        except NotMeasured:
            continue


def _continued(subjects: Subjects, teacher: Continuations, length: int, after: int) -> Continuations:
    """Return what the student writes after the teacher's text of `length` tokens; nothing where that has ended."""
    prefixes = teacher.ids[:, : teacher.prompt + length]
    seeds = [subjects.seed + index for index in range(len(prefixes))]
    found = scored(
        subjects, sampled(subjects, "student", prefixes, after, seeds=seeds), name=" what the student wrote after that"
    )
    found.alive[~teacher.alive[:, length]] = False
    return found
