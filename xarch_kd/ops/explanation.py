"""Explanation of the implementation that an operation would select, and the reasons against others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from xarch_kd.errors import UsageError
from xarch_kd.ops.dispatch import Explanation, Inquiry, explain_choice, machine_unsupported_reasons
from xarch_kd.ops.linear_divergence import linear_divergence
from xarch_kd.ops.mixing_distance import mixing_distance
from xarch_kd.ops.projected_distance import projected_distance
from xarch_kd.ops.similarity import similarity

OPERATIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "linear_divergence": linear_divergence,
    "mixing_distance": mixing_distance,
    "projected_distance": projected_distance,
    "similarity": similarity,
}


def explain(operation: str, *arguments: Any, impl: str = "auto", **options: Any) -> str:
    """Return which implementation `operation(*arguments, impl=impl, **options)` runs, and why not another, as text.

    Without arguments the text is about any inputs on this machine. Nothing is computed but the checks of the
    arguments.

    Raises:
        UsageError: what the operation itself refuses: an unknown operation or implementation, an implementation that
            cannot run, arguments that do not fit.

    >>> import torch
    >>> from xarch_kd import ops
    >>> features = torch.randn(2, 64, 8)
    >>> ops.explain("similarity", features, features).splitlines()[0]
    "similarity: impl='auto' runs 'streaming'"
    """
    if operation not in OPERATIONS or not (arguments or options):
        return explain_choice(operation, impl, machine_unsupported_reasons())
    try:
        OPERATIONS[operation](*arguments, impl=Inquiry(impl), **options)
    except Explanation as answer:
        return str(answer)
    except TypeError as error:
        raise UsageError(f"These are not the arguments of {operation}.", found=str(error)) from error
    raise AssertionError(f"{operation} chose no implementation")
