"""Checks of tensors that several operations share, and the one read of the device that settles all of a step.

A check of values has to read a scalar of the device and so waits for it. Operations pass such checks to `require`: it
reads at once, or, inside `DeferredChecks.collecting`, leaves the check to the collector, which reads all of them in one
go. Nothing that depends on the outcome may follow a deferred check but numbers that are thrown away if it fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xarch_kd.errors import UsageError, XarchError

Reduction = Literal["none", "mean", "sum"]

Rename = Callable[[XarchError], XarchError]


class _Check(NamedTuple):
    """A boolean scalar, and what to do if it is false: make an error to raise, or warn and return None."""

    ok: Tensor
    failed: Callable[[], XarchError | None]
    renames: tuple[Rename, ...]


class DeferredChecks:
    """Checks of values that one read of the device settles, in the order in which they were made."""

    def __init__(self) -> None:
        self._checks: list[_Check] = []
        self._indices: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._depth = 0

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect the checks made inside."""
        self._depth = len(_renames.get())
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def add(self, ok: Tensor, failed: Callable[[], XarchError | None]) -> None:
        """Take in a check: `ok` is a boolean scalar; if it is false `failed` makes the error, or warns."""
        self._checks.append(_Check(ok.detach(), failed, _renames.get()[self._depth :]))

    def set_indices(self, of: Tensor, indices: Tensor | None) -> None:
        """Make known which positions count by the mask or labels `of`: flat indices [k], None for all."""
        self._indices[id(of)] = (of, indices)

    def indices(self, of: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return (of, indices) where they are known."""
        return self._indices.get(id(of))

    def settle(self) -> None:
        """Read all checks at once, forget them, and raise the error of the first that failed."""
        made, self._checks, self._indices = self._checks, [], {}
        if not made:
            return
        device = next((check.ok.device for check in made if check.ok.device.type != "cpu"), made[0].ok.device)
        passed = torch.stack([check.ok.to(device) for check in made]).tolist()
        for check, ok in zip(made, passed, strict=True):
            error = None if ok else check.failed()
            if error is not None:
                for rename in reversed(check.renames):
                    error = rename(error)
                raise error


_active: ContextVar[DeferredChecks | None] = ContextVar("deferred_checks", default=None)
_renames: ContextVar[tuple[Rename, ...]] = ContextVar("renames", default=())


def require(ok: Tensor, error: Callable[[], XarchError]) -> None:
    """Raise `error()` unless the boolean scalar `ok` is true: now, or when a collector settles."""
    collector = _active.get()
    if collector is not None:
        collector.add(ok, error)
    elif not bool(ok):
        raise error()


def warn_unless(ok: Tensor, message: Callable[[], str], *, stacklevel: int) -> None:
    """Warn with `message()` unless the boolean scalar `ok` is true: now, or when a collector settles."""
    collector = _active.get()
    if collector is not None:
        collector.add(ok, lambda: warnings.warn(message(), stacklevel=stacklevel))
    elif not bool(ok):
        warnings.warn(message(), stacklevel=stacklevel)


def all_finite(*tensors: Tensor | None) -> Tensor:
    """Return a boolean scalar, true where every number of the given tensors is finite."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors if tensor is not None]).all()


@contextmanager
def settled_at_end(known: Callable[[DeferredChecks], None] | None = None) -> Iterator[None]:
    """Settle the checks made inside with one read at the end, or leave them to a collector that is active already.

    `known` makes indices known to the collector.
    """
    outer = _active.get()
    collector = DeferredChecks() if outer is None else outer
    if known is not None:
        known(collector)
    if outer is not None:
        yield
        return
    with collector.collecting():
        yield
    collector.settle()


@contextmanager
def renaming_errors(rename: Rename) -> Iterator[None]:
    """Pass errors raised inside, at once or by a check that is settled later, through `rename`."""
    token = _renames.set((*_renames.get(), rename))
    try:
        yield
    except XarchError as error:
        renamed = rename(error)
        if renamed is error:
            raise
        raise renamed from error
    finally:
        _renames.reset(token)


REDUCTIONS = ("none", "mean", "sum")


def check_floating(**tensors: Tensor | None) -> None:
    """Raise UsageError unless every given tensor is floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise UsageError(f"{name} must be floating point.", found=tensor.dtype, allowed="float16 to float64")


def check_device(**tensors: Tensor | None) -> None:
    """Raise UsageError unless all given tensors are on one device."""
    places = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise UsageError("The tensors are on different devices.", found=found, allowed="one device")


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Raise UsageError unless `tensor` is None or has the expected shape, whose axes `meaning` names."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise UsageError(f"{name} does not fit.", found=list(tensor.shape), allowed=f"{list(expected)} {meaning}")


def check_mask(mask: Tensor | None) -> None:
    """Raise UsageError unless `mask` is None or boolean."""
    if mask is not None and mask.dtype != torch.bool:
        raise UsageError(
            "mask must be boolean, true at valid tokens.",
            found=mask.dtype,
            allowed=torch.bool,
            fix="pass mask.bool()",
        )


def check_reduction(reduction: str) -> None:
    """Raise UsageError unless `reduction` is one of `none`, `mean` and `sum`."""
    if reduction not in REDUCTIONS:
        raise UsageError("There is no such reduction.", asked=reduction, allowed=" | ".join(REDUCTIONS))


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise UsageError unless `chunk_size` is None or a positive number of tokens."""
    if chunk_size is not None and chunk_size < 1:
        raise UsageError("chunk_size must be a positive number of tokens.", found=chunk_size, allowed=">= 1")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 when any tensor is float64, else float32: the dtype that values are computed in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def valid_token_indices(
    count: int, mask: Tensor | None, device: torch.device, *, of: Tensor | None = None
) -> Tensor | None:
    """Return the indices [k] of the valid ones of `count` tokens, or None when all are.

    Finding them reads the device once per mask: a collector keeps them, by the mask or by the labels `of` it came from.
    """
    if mask is None:
        return None
    collector = _active.get()
    source = mask if of is None else of
    known = None if collector is None else collector.indices(source)
    if known is not None:
        return known[1]
    indices = mask.reshape(-1).nonzero().squeeze(1).to(device)
    found = None if indices.numel() == count else indices
    if collector is not None:
        collector.set_indices(source, found)
    return found


def refuse_mean_of_nothing() -> UsageError:
    """Return the error for a mean over no tokens."""
    return UsageError(
        "The mean over valid tokens has no value: no token is valid.",
        found="every token is masked, ignored or has weight 0",
        allowed="at least one token",
        fix="use reduction='sum' and divide by the count of all micro-batches, or skip the batch",
    )


def refuse_swapped_sides(student: Iterable[Tensor | None], teacher: Iterable[Tensor | None]) -> None:
    """Raise UsageError when gradients are recorded and only the teacher's tensors require them.

    The teacher is detached everywhere, so such a call trains nothing: its two sides are swapped.
    """
    if not torch.is_grad_enabled():
        return
    trains = [any(tensor is not None and tensor.requires_grad for tensor in side) for side in (student, teacher)]
    if trains == [False, True]:
        raise UsageError(
            "Only the teacher's side requires gradients, and it never gets one.",
            found="tensors that require gradients where the teacher's belong, and none where the student's belong",
            allowed="the student first, the teacher second",
            fix="swap the two, or detach the teacher (torch.no_grad) if nothing is to be trained",
        )
