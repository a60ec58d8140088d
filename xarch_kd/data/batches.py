"""Batches of token rows, from the data source to the objectives, and the protocol of what yields them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from xarch_kd.data.length_groups import grouped_by_length
from xarch_kd.errors import UsageError
from xarch_kd.losses.tokens import IGNORED_LABEL, next_token_labels


@dataclass(frozen=True, kw_only=True, eq=False)
class _Derived:
    """Quantities derived from a batch on the host, so that no device is synchronized.

    `valid`, `labelled` and `predicted` are flat indices [k] (int64, on the batch's device) of the tokens that the mask
    keeps, of those of them with a label, and of those whose next token counts; None where that is all of them.
    `labelled_mask` [batch, time] is true at `labelled`.
    """

    fingerprint: str
    next_tokens: Tensor
    valid: Tensor | None
    labelled: Tensor | None
    labelled_mask: Tensor | None
    predicted: Tensor | None
    tokens: int
    labelled_tokens: int
    predictions: int
    is_packed: bool
    is_right_padded: bool

    def to(self, device: torch.device | str) -> _Derived:
        """Return it with its tensors on `device`."""
        moved = {
            name: None if tensor is None else tensor.to(device, non_blocking=True)
            for name, tensor in (
                (name, getattr(self, name)) for name in ("valid", "labelled", "labelled_mask", "predicted")
            )
        }
        return dataclasses.replace(self, next_tokens=self.next_tokens.to(device, non_blocking=True), **moved)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Batch:
    """One micro-batch: rows of token ids, which of them count, and where they came from.

    `input_ids` [batch, time] are integers; `attention_mask` [batch, time] is boolean, true where a token counts, and
    becomes None when it is true everywhere; `labels` [batch, time], unshifted, are -100 where a token is not to be
    predicted (a prompt); `position_ids` [batch, time] count from 0 in each document of a row that packs several, and
    become None where no row does; `origin` names the batch in messages.

    Values are checked and everything that follows from them is found here, once: build a batch from tensors of the
    host and move it with `to`; for tensors of a device they are copied to the host first.

    Raises UsageError for shapes or dtypes that do not fit, rows that are padded on the left, a label that counts on a
    masked token, and positions that neither count up nor begin again at 0.

    >>> import torch, xarch_kd.data.batches as batches
    >>> batches.Batch(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[-100, 6, 7]]), origin="a test")
    Batch(1 x 3 tokens, 3 count, 2 are predicted, from a test)
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    origin: str = "the caller"
    _derived: _Derived = field(default=None, repr=False)  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self._derived is None:
            _check_types(self)
            host = {name: None if value is None else value.detach().cpu() for name, value in self._tensors().items()}
            derived = _derive(host)
            if derived.valid is None:
                object.__setattr__(self, "attention_mask", None)
            if not derived.is_packed:
                object.__setattr__(self, "position_ids", None)
            object.__setattr__(self, "_derived", derived.to(self.input_ids.device))

    def __repr__(self) -> str:
        rows, time = self.input_ids.shape
        return (
            f"Batch({rows} x {time} tokens, {self.tokens} count, {self.predictions} are predicted, from {self.origin})"
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "labels", "position_ids")}

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.input_ids.device

    @property
    def tokens(self) -> int:
        """Number of tokens that the mask keeps."""
        return self._derived.tokens

    @property
    def predictions(self) -> int:
        """Number of positions whose next token counts."""
        return self._derived.predictions

    @property
    def next_tokens(self) -> Tensor:
        """Label of each position [batch, time]: the token that follows, or -100 (`next_token_labels`)."""
        return self._derived.next_tokens

    @property
    def valid(self) -> Tensor | None:
        """Flat indices [k] of the tokens that the mask keeps; None for all."""
        return self._derived.valid

    @property
    def labelled(self) -> Tensor | None:
        """Flat indices [k] of the tokens that the mask keeps and that have a label; None for all."""
        return self._derived.labelled

    @property
    def labelled_mask(self) -> Tensor | None:
        """Tokens [batch, time] that the mask keeps and that have a label, boolean; None for all."""
        return self._derived.labelled_mask

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens that the mask keeps and that have a label; without labels, all that it keeps."""
        return self._derived.labelled_tokens

    @property
    def predicted(self) -> Tensor | None:
        """Flat indices [k] of the positions whose next token counts; None for all."""
        return self._derived.predicted

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a model reads: ids, mask and position ids, with their shape. Labels are not in it."""
        return self._derived.fingerprint

    @property
    def model_mask(self) -> Tensor | None:
        """The mask as models of transformers take it: int64 [batch, time], 1 where a token counts.

        None for packed rows with padding at their ends alone: models that keep their documents apart take position ids
        instead of a mask, and are causal, so that no token sees the padding after it.
        """
        if self.attention_mask is None or (self.position_ids is not None and self._derived.is_right_padded):
            return None
        return self.attention_mask.long()

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; its values are not read again."""
        if self.device == torch.device(device):
            return self
        moved = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in self._tensors().items()
        }
        return Batch(**moved, origin=self.origin, _derived=self._derived.to(device))  # type: ignore[arg-type]

    def shard(self, rank: int, ranks: int) -> Batch:
        """Return the rows of one of `ranks` processes: row r goes to rank r modulo `ranks`.

        Raises UsageError when there are fewer rows than ranks.
        """
        if ranks == 1:
            return self
        if self.input_ids.shape[0] < ranks:
            raise UsageError(
                "a micro-batch has fewer rows than there are processes",
                found=f"{self.input_ids.shape[0]} rows for {ranks} processes",
                allowed=f"batch_size >= {ranks}",
                fix=f"raise the stage's batch_size to {ranks}, or start fewer processes",
            )
        return self._rows(slice(rank, None, ranks), self.input_ids.shape[1])

    @property
    def time(self) -> int:
        """Length of the rows, padding included."""
        return self.input_ids.shape[1]

    def apart(self) -> tuple[Batch, ...]:
        """Return the documents of packed rows as rows of their own, padded on the right; other batches unchanged.

        Documents of similar length are one batch, so that padding stays small (`grouped_by_length`).
        """
        if self.position_ids is None:
            return (self,)
        host = {name: None if value is None else value.cpu() for name, value in self._tensors().items()}
        pieces = _document_pieces(host)
        if not pieces:
            return ()
        lengths = numpy.array([stop - start for _, start, stop in pieces])
        parts = []
        for group in grouped_by_length(lengths):
            time = int(lengths[group].max())
            parts.append(_of_pieces(host, [pieces[at] for at in group], time, self.origin).to(self.device))
        return tuple(parts)

    def unpadded(self) -> Iterator[Batch]:
        """Yield the rows without their padding, as one batch per length; rows without a token are left out.

        Raises UsageError for a mask with padding between tokens.
        """
        if self.attention_mask is None:
            yield self
            return
        mask = self.attention_mask.cpu()
        lengths = mask.sum(1)
        if bool((mask != (torch.arange(mask.shape[1]) < lengths[:, None])).any()):
            raise UsageError("attention_mask has padding between tokens", allowed="padding after the last token alone")
        for length in lengths.unique().tolist():
            if length > 0:
                yield self._rows((lengths == length).nonzero().squeeze(1).to(self.device), length)

    def _rows(self, rows: slice | Tensor, time: int) -> Batch:
        """Return the first `time` tokens of some rows."""
        own = {name: None if value is None else value[rows, :time] for name, value in self._tensors().items()}
        return Batch(**own, origin=self.origin)  # type: ignore[arg-type]


class BatchSource(Protocol):
    """An endless stream of micro-batches whose state can be saved and restored.

    Every process of a run draws the same batches and takes its rows of them, so the state is the same on all ranks.
    """

    def draw(self) -> Batch:
        """Return the next micro-batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises CheckpointError when it is of another source."""
        ...


def _document_pieces(host: Mapping[str, Tensor | None]) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of each document of packed rows, without padding."""
    ids, positions, mask = host["input_ids"], host["position_ids"], host["attention_mask"]
    assert ids is not None and positions is not None
    kept = numpy.ones(ids.shape, dtype=bool) if mask is None else mask.numpy()
    pieces = []
    for row in range(len(ids)):
        length = int(kept[row].sum())
        starts = [0, *(at for at in (positions[row, :length] == 0).nonzero().flatten().tolist() if at)]
        pieces += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True) if stop]
    return pieces


def _of_pieces(
    host: Mapping[str, Tensor | None], pieces: Sequence[tuple[int, int, int]], time: int, origin: str
) -> Batch:
    ids, labels = host["input_ids"], host["labels"]
    assert ids is not None
    own_ids = torch.zeros(len(pieces), time, dtype=ids.dtype)
    own_labels = None if labels is None else torch.full((len(pieces), time), IGNORED_LABEL, dtype=labels.dtype)
    mask = torch.zeros(len(pieces), time, dtype=torch.bool)
    for number, (row, start, stop) in enumerate(pieces):
        own_ids[number, : stop - start] = ids[row, start:stop]
        mask[number, : stop - start] = True
        if own_labels is not None and labels is not None:
            own_labels[number, : stop - start] = labels[row, start:stop]
    return Batch(input_ids=own_ids, attention_mask=mask, labels=own_labels, origin=origin)


def _check_types(batch: Batch) -> None:
    """Check shapes, dtypes and devices, without reading a value."""
    ids = batch.input_ids
    if ids.dim() != 2 or 0 in ids.shape:
        raise UsageError("input_ids does not fit.", found=list(ids.shape), allowed="[batch, time], both at least 1")
    for name, tensor in batch._tensors().items():
        if tensor is None:
            continue
        if tensor.shape != ids.shape:
            raise UsageError(f"{name} does not fit.", found=list(tensor.shape), allowed=f"{list(ids.shape)}")
        if tensor.device != ids.device:
            raise UsageError(f"{name} is on another device than input_ids.", found=tensor.device, allowed=ids.device)
        if name == "attention_mask":
            if tensor.dtype != torch.bool:
                raise UsageError(
                    "attention_mask must be boolean, true where a token counts.",
                    found=tensor.dtype,
                    allowed=torch.bool,
                    fix="attention_mask.bool()",
                )
        elif tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UsageError(f"{name} must be integers.", found=tensor.dtype, allowed="an integer dtype")


def _derive(host: Mapping[str, Tensor | None]) -> _Derived:
    """Check the values of tensors of the host, by name, and return what follows from them."""
    ids, positions, labels = host["input_ids"], host["position_ids"], host["labels"]
    assert ids is not None
    mask = numpy.ones(ids.shape, dtype=bool)
    if host["attention_mask"] is not None:
        mask = host["attention_mask"].numpy()
        _check_padding(mask)
    if labels is not None:
        _check_labels(labels.numpy(), mask)
    starts = numpy.zeros(ids.shape, dtype=bool) if positions is None else _document_starts(positions.numpy(), mask)
    is_full, is_packed = bool(mask.all()), bool(starts[:, 1:].any())
    next_tokens = next_token_labels(ids, None if is_full else torch.from_numpy(mask), labels=labels)
    # The first token of a document does not follow from the document before it.
    next_tokens[:, :-1][torch.from_numpy(starts[:, 1:])] = IGNORED_LABEL
    counts = (next_tokens != IGNORED_LABEL).numpy()
    labelled = mask if labels is None else mask & (labels.numpy() != IGNORED_LABEL)
    is_labelled = bool(labelled.all())
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    for name, values in (
        ("ids", ids),
        ("mask", None if is_full else mask),
        ("positions", positions if is_packed else None),
    ):
        if values is not None:
            digest.update(name.encode() + numpy.ascontiguousarray(values, dtype=numpy.int64).tobytes())
    return _Derived(
        fingerprint=digest.hexdigest(),
        next_tokens=next_tokens,
        valid=None if is_full else torch.from_numpy(mask.reshape(-1).nonzero()[0]),
        labelled=None if is_labelled else torch.from_numpy(labelled.reshape(-1).nonzero()[0]),
        labelled_mask=None if is_labelled else torch.from_numpy(labelled.copy()),
        predicted=None if counts.all() else torch.from_numpy(counts.reshape(-1).nonzero()[0]),
        tokens=int(mask.sum()),
        labelled_tokens=int(labelled.sum()),
        predictions=int(counts.sum()),
        is_packed=is_packed,
        is_right_padded=bool((mask[:, :-1] >= mask[:, 1:]).all()),
    )


def _check_padding(mask: numpy.ndarray) -> None:
    """Raise UsageError for a row that begins with padding and has tokens after it.

    Fused Mamba-2 training kernels take no mask: the bias of the convolution then leaks from padding into the tokens,
    which no value would show.
    """
    padded = (~mask[:, 0] & mask.any(1)).nonzero()[0]
    if padded.size:
        raise UsageError(
            "rows are padded on the left, where recurrent mixers carry padding into the tokens when they train",
            found=f"an attention_mask whose row {padded[0]} begins with 0",
            allowed="packed or right-padded rows",
            fix='tokenizer.padding_side = "right"',
        )


def _check_labels(labels: numpy.ndarray, mask: numpy.ndarray) -> None:
    wrong = numpy.argwhere((labels != IGNORED_LABEL) & ~mask)
    if wrong.size:
        row, position = wrong[0]
        raise UsageError(
            "attention_mask and labels disagree: a masked token has a label that counts",
            found=f"{len(wrong)} such tokens, the first in row {row} at position {position}, "
            f"label {labels[row, position]}",
            allowed=f"{IGNORED_LABEL} wherever attention_mask is 0",
            fix=f"labels.masked_fill(attention_mask == 0, {IGNORED_LABEL})",
        )


def _document_starts(positions: numpy.ndarray, mask: numpy.ndarray) -> numpy.ndarray:
    """Return where a document of a packed row begins [batch, time]. Raises UsageError for positions that jump."""
    before = numpy.concatenate((numpy.full_like(positions[:, :1], -1), positions[:, :-1]), axis=1)
    wrong = numpy.argwhere((positions != 0) & (positions != before + 1) & mask)
    if wrong.size:
        row, at = wrong[0]
        raise UsageError(
            "position_ids jump",
            found=f"{positions[row, at]} after {before[row, at]} in row {row} at position {at}",
            allowed="positions that count from 0 in each document of a row",
        )
    return (positions == 0) & mask
