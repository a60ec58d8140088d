"""Divergences between a teacher's distribution p and a student's q: one table of formulas, and how one is chosen.

`FORMULAS` is read by every implementation of `linear_divergence`: `reference` takes `values`, `streaming` takes `rows`,
`fused` takes `kernel`. A divergence of one's own is a `DivergenceFormula` with `values` alone, and is passed where a
name is: `streaming` then differentiates it by autograd, one group of rows at a time, and there is no `fused`.

    >>> import torch
    >>> from xarch_kd.ops import DivergenceFormula, linear_divergence
    >>> def squared_hellinger(log_q, log_p):
    ...     return 1 - torch.exp((log_q + log_p) / 2).sum(-1)
    >>> hellinger = DivergenceFormula(name="hellinger", values=squared_hellinger)
    >>> hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    >>> loss = linear_divergence(hidden.requires_grad_(), weight, torch.randn(4, 8), weight, divergence=hellinger)
    >>> loss.total.backward()
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.ops import divergence_rows as closed
from xarch_kd.ops import divergence_values as dense
from xarch_kd.ops.tables import look_up, table

DivergenceKind = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha",
    "renyi",
    "alpha_beta",
    "entropy_aware",
    "adaptive_kl",
]
# Keyword arguments of the formulas.
PARAMETERS: Final = ("beta", "alpha", "threshold", "head_mass")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of a divergence: its name, its default, and the range in which D is a divergence.

    `limits` are the ends of the range where the formula divides by 0 or is 0, and the divergence without a parameter
    that it is there.
    """

    name: Literal["beta", "alpha", "threshold", "head_mass"]
    default: float
    allowed: str
    contains: Callable[[float], bool]
    limits: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DivergenceFormula:
    """Formula of a divergence D(p, q) of the teacher's p and the student's q.

    `values(log_q=, log_p=)` returns D [tokens] from log-probabilities [tokens, entries] of student and teacher, plus
    the keyword arguments of `parameter` and `second`, if any, and `normalised` if `normalizable`. It is called by
    keyword, so that the two cannot be swapped, and must be differentiable in log_q; the value of a row depends on that
    row alone.

    `rows(q, p, gradient)` is its closed form (`ops.divergence_rows`), None for autograd; `kernel` is its code in
    `kernels/linear_divergence.py`, None if there is none. `saturates`: the gradient vanishes where student and teacher
    share no mass.

    Raises UsageError if `values` takes no `log_q` and `log_p`.

    >>> import torch
    >>> from xarch_kd import ops
    >>> def total_variation(log_q, log_p):
    ...     return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
    >>> ops.DivergenceFormula(name="total_variation", values=total_variation).name
    'total_variation'
    """

    name: str
    values: Callable[..., Tensor]
    rows: Callable[..., closed.Rows] | None = None
    kernel: str | None = None
    parameter: Parameter | None = None
    second: Parameter | None = None
    normalizable: bool = False
    saturates: bool = False

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.values).bind_partial(log_q=None, log_p=None)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The formula of the divergence '{self.name}' does not fit.",
                found=str(error),
                allowed="values(log_q, log_p): log-probabilities [tokens, entries] of student and teacher",
                fix="name its arguments log_q and log_p",
            ) from error


def _fraction(value: float) -> bool:
    return 0 <= value <= 1


def _below_one(value: float) -> bool:
    return 0 <= value < 1


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _not_negative(value: float) -> bool:
    return value >= 0 and math.isfinite(value)


def _skew(end: str) -> Parameter:
    allowed = "0 <= alpha < 1 (at 1 it is 0 for every student)"
    return Parameter(name="alpha", default=0.1, allowed=allowed, contains=_below_one, limits={0.0: end})


FORMULAS: Final[Mapping[str, DivergenceFormula]] = table(
    "divergences",
    DivergenceKind,
    (
        DivergenceFormula(name="forward_kl", values=dense.forward_kl, rows=closed.forward_kl, kernel="forward_kl"),
        DivergenceFormula(name="reverse_kl", values=dense.reverse_kl, rows=closed.reverse_kl, kernel="reverse_kl"),
        DivergenceFormula(
            name="jsd",
            values=dense.jsd,
            rows=closed.jsd,
            kernel="jsd",
            parameter=Parameter(
                name="beta",
                default=0.5,
                allowed="0 <= beta <= 1",
                contains=_fraction,
                limits={0.0: "forward_kl", 1.0: "reverse_kl"},
            ),
            normalizable=True,
            saturates=True,
        ),
        DivergenceFormula(
            name="skew_forward_kl",
            values=dense.skew_forward_kl,
            rows=closed.skew_forward_kl,
            kernel="skew_forward_kl",
            parameter=_skew("forward_kl"),
            saturates=True,
        ),
        DivergenceFormula(
            name="skew_reverse_kl",
            values=dense.skew_reverse_kl,
            rows=closed.skew_reverse_kl,
            kernel="skew_reverse_kl",
            parameter=_skew("reverse_kl"),
            saturates=True,
        ),
        DivergenceFormula(
            name="total_variation",
            values=dense.total_variation,
            rows=closed.total_variation,
            kernel="total_variation",
            saturates=True,
        ),
        DivergenceFormula(
            name="alpha",
            values=dense.alpha_divergence,
            rows=closed.alpha_divergence,
            kernel="alpha",
            parameter=Parameter(
                name="alpha",
                default=0.5,
                allowed="a finite alpha",
                contains=math.isfinite,
                limits={1.0: "forward_kl", 0.0: "reverse_kl"},
            ),
        ),
        DivergenceFormula(
            name="renyi",
            values=dense.renyi,
            rows=closed.renyi,
            kernel="renyi",
            parameter=Parameter(
                name="alpha",
                default=0.5,
                allowed="a finite alpha > 0",
                contains=_positive,
                limits={1.0: "forward_kl"},
            ),
        ),
        DivergenceFormula(
            name="alpha_beta",
            values=dense.alpha_beta,
            parameter=Parameter(name="alpha", default=0.2, allowed="a finite alpha > 0", contains=_positive),
            second=Parameter(name="beta", default=0.7, allowed="a finite beta > 0", contains=_positive),
        ),
        DivergenceFormula(
            name="entropy_aware",
            values=dense.entropy_aware,
            rows=closed.entropy_aware,
            parameter=Parameter(name="threshold", default=1.0, allowed="nats, at least 0", contains=_not_negative),
        ),
        DivergenceFormula(
            name="adaptive_kl",
            values=dense.adaptive_kl,
            parameter=Parameter(name="head_mass", default=0.5, allowed="0 <= head_mass <= 1", contains=_fraction),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A divergence D(p, q) of the teacher's p and the student's q, in nats except `total_variation` and `alpha`.

    | kind | D |
    |---|---|
    | `forward_kl` | KL(p ‖ q) |
    | `reverse_kl` | KL(q ‖ p) |
    | `jsd` | β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q (GKD, arXiv 2306.13649) |
    | `skew_forward_kl` | KL(p ‖ a p + (1-a) q) (DistiLLM, arXiv 2402.03898) |
    | `skew_reverse_kl` | KL(q ‖ a q + (1-a) p) |
    | `total_variation` | ½ Σ abs(p - q) |
    | `alpha` | (Σ p^a q^(1-a) - 1) / (a (a-1)), Amari; forward KL at a=1, reverse KL at a=0 |
    | `renyi` | log Σ p^a q^(1-a) / (a-1), forward KL at a=1 |
    | `alpha_beta` | Σ [a p^s / s + b q^s / s - p^a q^b] / (a b), s = a + b (ABKD, arXiv 2505.04560) |
    | `entropy_aware` | KL(p ‖ q) where the entropy of p is above `threshold`, KL(q ‖ p) where the teacher is sure |
    | `adaptive_kl` | w KL(p ‖ q) + (1-w) KL(q ‖ p), w the share of Σ abs(p - q) in the head of p: its likeliest entries
    with at most `head_mass` together, one at least (AKL, arXiv 2404.02657) |

    `kind` is a name of this table or a `DivergenceFormula`. `normalised` (only `jsd`) divides by β(1-β), so that the
    family runs continuously from forward KL at β=0 to reverse KL at β=1. Without it β=0 is forward KL and β=1 reverse
    KL too, as in GKD, with a jump: plain JSD tends to 0 there.

    Raises UsageError for an unknown kind, a parameter that the kind does not take, or one out of range.

    >>> from xarch_kd import ops
    >>> ops.Divergence(kind="jsd", beta=0.5).beta
    0.5
    """

    kind: str | DivergenceFormula
    beta: float | None = None
    alpha: float | None = None
    normalised: bool = False
    threshold: float | None = None
    head_mass: float | None = None

    def __post_init__(self) -> None:
        name = self.name
        own = {parameter.name: parameter for parameter in (self.formula.parameter, self.formula.second) if parameter}
        for other in PARAMETERS:
            if getattr(self, other) is not None and other not in own:
                raise UsageError(
                    f"The divergence '{name}' takes no {other}.",
                    found=f"{other}={getattr(self, other)}",
                    allowed=" | ".join(own) or "no parameter",
                )
        if self.normalised and not self.formula.normalizable:
            takers = " | ".join(row.name for row in FORMULAS.values() if row.normalizable)
            raise UsageError(f"The divergence '{name}' takes no normalised.", allowed=f"only {takers} takes it")
        for parameter in own.values():
            if getattr(self, parameter.name) is None:
                object.__setattr__(self, parameter.name, parameter.default)
            value = getattr(self, parameter.name)
            if not parameter.contains(value):
                raise UsageError(
                    f"The {parameter.name} of the divergence '{name}' is out of range.",
                    found=f"{parameter.name}={value}",
                    allowed=parameter.allowed,
                )

    @property
    def formula(self) -> DivergenceFormula:
        """The formula that every implementation reads."""
        if isinstance(self.kind, DivergenceFormula):
            return self.kind
        return look_up("divergence", self.kind, FORMULAS)

    @property
    def name(self) -> str:
        """Name of the divergence."""
        return self.formula.name

    @property
    def parameter(self) -> float | None:
        """The first parameter of this kind, or None."""
        own = self.formula.parameter
        return None if own is None else getattr(self, own.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the formula."""
        own = (self.formula.parameter, self.formula.second)
        given = {parameter.name: getattr(self, parameter.name) for parameter in own if parameter is not None}
        return given | {"normalised": self.normalised} if self.formula.normalizable else given

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return D(p, q) [tokens] from log-probabilities [tokens, entries] of the student and of the teacher.

        Raises UsageError if the formula returns another shape, or values without a gradient where `log_q` has one.
        """
        found: Any = self.formula.values(log_q=log_q, log_p=log_p, **self.arguments)
        if not isinstance(found, Tensor) or found.shape != log_q.shape[:-1]:
            raise UsageError(
                f"The formula of the divergence '{self.name}' returns the wrong shape.",
                found=list(found.shape) if isinstance(found, Tensor) else type(found).__name__,
                allowed=f"{list(log_q.shape[:-1])} [tokens]",
                fix="sum over the last axis, the entries of the distributions",
            )
        if torch.is_grad_enabled() and log_q.requires_grad and not found.requires_grad:
            raise UsageError(
                f"The formula of the divergence '{self.name}' has no gradient.",
                allowed="values that autograd can differentiate in log_q",
                fix="compute them from log_q by torch operations, without detach, item or numpy",
            )
        return found

    def limit(self) -> Divergence:
        """Return the Kullback-Leibler divergence that this one is at the end of its range, else itself."""
        parameter, value = self.formula.parameter, self.parameter
        end = None if parameter is None or value is None else parameter.limits.get(float(value))
        return self if end is None else Divergence(kind=end)


def as_divergence(value: str | Mapping[str, Any] | Divergence | DivergenceFormula) -> Divergence:
    """Read a divergence given as a name, `{"kind": "jsd", "beta": 0.5}`, a `Divergence` or a `DivergenceFormula`."""
    if isinstance(value, Divergence):
        return value
    if isinstance(value, str | DivergenceFormula):
        return Divergence(kind=value)
    known = ("kind", *PARAMETERS, "normalised")
    unknown = sorted(set(value) - set(known))
    if unknown or "kind" not in value:
        raise UsageError(
            "A divergence given as a mapping needs 'kind' and takes at most these keys.",
            found=", ".join(map(str, value)) or "an empty mapping",
            allowed=" | ".join(known),
        )
    return Divergence(**value)
