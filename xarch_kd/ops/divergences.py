"""The divergences between a teacher's distribution p and a student's q: names, parameters and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from xarch_kd.errors import UsageError, suggest

# Name -> the parameter it takes, if any.
PARAMETERS: Final[Mapping[str, str | None]] = {
    "forward_kl": None,
    "reverse_kl": None,
    "jsd": "beta",
    "skew_forward_kl": "alpha",
    "skew_reverse_kl": "alpha",
    "total_variation": None,
    "alpha": "alpha",
    "renyi": "alpha",
}
DEFAULTS: Final[Mapping[str, float]] = {
    "jsd": 0.5,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "alpha": 0.5,
    "renyi": 0.5,
}


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

    `normalised` (only `jsd`) divides by β(1-β), so that the family runs continuously from forward KL at β=0 to reverse
    KL at β=1. Without it β=0 is forward KL and β=1 reverse KL too, as in GKD, with a jump: plain JSD tends to 0 there.
    """

    kind: str
    beta: float | None = None
    alpha: float | None = None
    normalised: bool = False

    def __post_init__(self) -> None:
        if self.kind not in PARAMETERS:
            raise UsageError(
                f"There is no such divergence.{suggest(self.kind, PARAMETERS)}",
                asked=self.kind,
                allowed=" | ".join(PARAMETERS),
            )
        own = PARAMETERS[self.kind]
        for name in ("beta", "alpha"):
            if getattr(self, name) is not None and name != own:
                raise UsageError(
                    f"The divergence '{self.kind}' takes no {name}.",
                    found=f"{name}={getattr(self, name)}",
                    allowed=own or "no parameter",
                )
        if self.normalised and self.kind != "jsd":
            raise UsageError(f"The divergence '{self.kind}' takes no normalised.", allowed="only jsd takes it")
        if own is not None:
            if getattr(self, own) is None:
                object.__setattr__(self, own, DEFAULTS[self.kind])
            self._check_range(own, getattr(self, own))

    def _check_range(self, name: str, value: float) -> None:
        """Raise UsageError when the parameter is outside the range in which the divergence means something."""
        inside, allowed = {
            "jsd": (0 <= value <= 1, "0 <= beta <= 1"),
            "skew_forward_kl": (0 <= value < 1, "0 <= alpha < 1 (at 1 it is 0 for every student)"),
            "skew_reverse_kl": (0 <= value < 1, "0 <= alpha < 1 (at 1 it is 0 for every student)"),
            "alpha": (math.isfinite(value), "a finite alpha"),
            "renyi": (value > 0 and math.isfinite(value), "a finite alpha > 0"),
        }[self.kind]
        if not inside:
            raise UsageError(
                f"The {name} of the divergence '{self.kind}' is out of range.", found=f"{name}={value}", allowed=allowed
            )

    @property
    def parameter(self) -> float | None:
        """The one parameter of this kind, or None."""
        own = PARAMETERS[self.kind]
        return None if own is None else getattr(self, own)

    def limit(self) -> Divergence:
        """Return the Kullback-Leibler divergence that this one is at the end of its range, else itself."""
        ends = {
            ("jsd", 0.0): "forward_kl",
            ("jsd", 1.0): "reverse_kl",
            ("skew_forward_kl", 0.0): "forward_kl",
            ("skew_reverse_kl", 0.0): "reverse_kl",
            ("alpha", 1.0): "forward_kl",
            ("alpha", 0.0): "reverse_kl",
            ("renyi", 1.0): "forward_kl",
        }
        value = self.parameter
        end = None if value is None else ends.get((self.kind, float(value)))
        return self if end is None else Divergence(kind=end)


def as_divergence(value: str | Mapping[str, Any] | Divergence) -> Divergence:
    """Read a divergence given as a name, as `{"kind": "jsd", "beta": 0.5}` or as a `Divergence`."""
    if isinstance(value, Divergence):
        return value
    if isinstance(value, str):
        return Divergence(kind=value)
    known = ("kind", "beta", "alpha", "normalised")
    unknown = sorted(set(value) - set(known))
    if unknown or "kind" not in value:
        raise UsageError(
            "A divergence given as a mapping needs 'kind' and takes at most these keys.",
            found=", ".join(map(str, value)) or "an empty mapping",
            allowed=" | ".join(known),
        )
    return Divergence(**value)
