"""Passes of the teacher with new mixers in some of its blocks, and what they do to its next-token distributions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from xarch_kd.calibration.recall_rows import RecallRows
from xarch_kd.errors import NonFiniteLoss, TapError
from xarch_kd.mapping_file.layer_choice import Metric
from xarch_kd.mixing.scan import recomputed
from xarch_kd.taps.layout import Layout, head_logits, run_base
from xarch_kd.taps.replay import BlockCall, block_calls, run_block
from xarch_kd.taps.trace import trace

# Tokens of a sliding window, and first tokens that are always seen.
WINDOW: Final = 32
SINKS: Final = 4


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Next-token distributions of the teacher with some new mixers, compared with its own.

    `kl` [positions] is KL(teacher ‖ substituted) at positions of text, `copy_nll` and `value_nll` the losses of tokens
    that are to be recalled, all in nats; `copying` is the share of copied tokens that are predicted right.
    """

    kl: Tensor
    copy_nll: Tensor
    value_nll: Tensor
    copying: float

    @property
    def recall(self) -> float:
        """The mean loss of recalled tokens, copies and values alike."""
        return float(self.copy_nll.mean() + self.value_nll.mean()) / 2


class SubstitutedTeacher:
    """The teacher with blocks of a converted student in place of its own.

    `pool` has, for each block that can be replaced, the layout of a student with a new mixer there. Passes run in the
    dtype of the weights, on rows of text and on rows that test recall; the KL is computed where `compared`
    [rows, time] is true. Inputs of the blocks under one set of replaced blocks, the base, are kept: exchanging a single
    block runs only the blocks after it. `own` is the effect of no new mixer at all.

    Raises TapError for a model that is more than a chain of blocks.
    """

    @torch.no_grad()
    def __init__(
        self, teacher: Layout, pool: Mapping[int, Layout], text: Tensor, compared: Tensor, recall: RecallRows
    ) -> None:
        self.teacher, self.pool = teacher, pool
        self.recall_rows = recall
        self._rows = [_Rows(teacher, pool, text), _Rows(teacher, pool, recall.input_ids)]
        self._compared = compared
        self._targets = recall.input_ids.roll(-1, 1)
        self.base: frozenset[int] = frozenset()
        self._own = torch.log_softmax(self._logits(self._rows[0].end, compared), -1)
        self.own = self._effect([rows.end for rows in self._rows])

    @property
    def row_length(self) -> int:
        """Tokens of a row of text."""
        return self._compared.shape[1]

    @torch.no_grad()
    def rebase(self, replaced: Collection[int]) -> None:
        """Keep the inputs of all blocks with new mixers in `replaced`."""
        self.base = frozenset(replaced)
        for rows in self._rows:
            rows.rebase(self.base)

    @torch.no_grad()
    def exchanged(self, layer: int) -> Effect:
        """Return the effect of the base with one block exchanged: new where it is the teacher's, and the reverse."""
        return self._effect([rows.exchanged(layer) for rows in self._rows])

    @torch.no_grad()
    def windowed(self, layer: int) -> Effect:
        """Return the effect of a sliding window with sinks on the teacher's attention in one block.

        The base must be the teacher itself. Raises TapError for a block that takes no attention mask.
        """
        return self._effect([rows.windowed(layer) for rows in self._rows])

    @torch.no_grad()
    def base_effect(self) -> Effect:
        """Return the effect of the base."""
        return self._effect([rows.end for rows in self._rows])

    @torch.no_grad()
    def effect(self, replaced: Collection[int]) -> Effect:
        """Return the effect of new mixers in all of `replaced`."""
        return self._effect([rows.run(frozenset(replaced), 0, rows.start) for rows in self._rows])

    def gated_divergence(self, shares: Tensor, metric: Metric) -> Tensor:
        """Return the mean KL(teacher ‖ gated) in nats, where block l gives shares[l]·own + (1 − shares[l])·new.

        By `kl` it is that of positions of text, by `recall` that of the tokens before recalled ones, by `both` their
        sum. Gradients reach `shares` [blocks].
        """
        places = {"kl": self._compared, "recall": self.recall_rows.copies | self.recall_rows.values}
        total = shares.new_zeros(())
        for name, rows in zip(("kl", "recall"), self._rows, strict=True):
            if metric in (name, "both"):
                with torch.no_grad():
                    own = torch.log_softmax(self._logits(rows.run(frozenset(), 0, rows.start), places[name]), -1)
                found = torch.log_softmax(self._logits(rows.gated(shares), places[name]), -1)
                divergence = torch.nn.functional.kl_div(found, own, log_target=True, reduction="none")
                total = total + divergence.sum(-1).mean()
        return total

    def _effect(self, hidden: Sequence[Tensor]) -> Effect:
        found = torch.log_softmax(self._logits(hidden[0], self._compared), -1)
        kl = torch.nn.functional.kl_div(found, self._own, log_target=True, reduction="none").sum(-1)
        copies = self._logits(hidden[1], self.recall_rows.copies)
        values = self._logits(hidden[1], self.recall_rows.values)
        wanted = self._targets[self.recall_rows.copies].to(copies.device)
        effect = Effect(
            kl=kl.cpu(),
            copy_nll=torch.nn.functional.cross_entropy(copies, wanted, reduction="none").cpu(),
            value_nll=torch.nn.functional.cross_entropy(
                values, self._targets[self.recall_rows.values].to(values.device), reduction="none"
            ).cpu(),
            copying=float((copies.argmax(-1) == wanted).float().mean()),
        )
        for name, values_ in (("KL", effect.kl), ("loss of recalled tokens", effect.copy_nll)):
            if not bool(values_.isfinite().all()):
                raise NonFiniteLoss(
                    f"The {name} of the teacher with a new mixer is not finite.",
                    fix="choose the layers by a list, or start the mixers differently (init: random)",
                )
        return effect

    def _logits(self, hidden: Tensor, at: Tensor) -> Tensor:
        """Return float32 logits [positions, vocabulary] where `at` [rows, time] is true."""
        picked = hidden[at.to(hidden.device)]
        norm = self.teacher.final_norm
        return head_logits(self.teacher, picked if norm is None else norm(picked)).float()


def window_mask(time: int) -> Tensor:
    """Return the mask [1, 1, time, time] of a sliding window with sinks, to be added to scores: 0 or very negative.

    Token i sees itself, the 31 tokens before it and the first 4.
    """
    places = torch.arange(time)
    distance = places[:, None] - places[None, :]
    seen = (distance >= 0) & ((distance < WINDOW) | (places[None, :] < SINKS))
    return torch.zeros(1, 1, time, time).masked_fill(~seen, torch.finfo(torch.float32).min)


class _Rows:
    """Rows of tokens of one length, and the calls of the blocks of all models for them."""

    def __init__(self, teacher: Layout, pool: Mapping[int, Layout], input_ids: Tensor) -> None:
        self.teacher, self.pool = teacher, pool
        device = next(teacher.model.parameters()).device
        self.input_ids = input_ids.to(device)
        layouts = {id(layout): layout for layout in (teacher, *pool.values())}
        self._calls: dict[int, tuple[BlockCall, ...]] = {
            key: block_calls(layout, self.input_ids) for key, layout in layouts.items()
        }
        self.start: Tensor = trace(teacher, self.input_ids, taps=["embedding"])["embedding"]
        self.end = self.start
        self._inputs: list[Tensor] = []
        self._base: frozenset[int] = frozenset()
        self._check_chain()

    def block(self, layer: int, is_new: bool, hidden: Tensor) -> Tensor:
        layout = self.pool[layer] if is_new else self.teacher
        dtype = next(layout.blocks[layer].parameters()).dtype
        return run_block(layout, layer, hidden.to(dtype), self._calls[id(layout)]).to(hidden.dtype)

    def run(self, replaced: frozenset[int], first: int, hidden: Tensor) -> Tensor:
        for layer in range(first, len(self.teacher.blocks)):
            hidden = self.block(layer, layer in replaced, hidden)
        return hidden

    def gated(self, shares: Tensor) -> Tensor:
        """Return the blocks' result where each gives its share of the teacher's block and the rest of the new one."""
        hidden = self.start
        for layer in range(len(self.teacher.blocks)):

            def mixed(hidden: Tensor, share: Tensor, layer: int = layer) -> Tensor:
                own, new = (self.block(layer, is_new, hidden) for is_new in (False, True))
                return own * share.to(own.dtype) + new * (1 - share).to(own.dtype)

            hidden = recomputed(mixed, hidden, shares[layer])
        return hidden

    def rebase(self, base: frozenset[int]) -> None:
        self._base, self._inputs, hidden = base, [], self.start
        for layer in range(len(self.teacher.blocks)):
            self._inputs.append(hidden)
            hidden = self.block(layer, layer in base, hidden)
        self.end = hidden

    def exchanged(self, layer: int) -> Tensor:
        hidden = self.block(layer, layer not in self._base, self._inputs[layer])
        return self.run(self._base, layer + 1, hidden)

    def windowed(self, layer: int) -> Tensor:
        call = self._calls[id(self.teacher)][layer]
        if "attention_mask" not in call.kwargs:
            raise TapError(
                f"A block of {type(self.teacher.model).__name__} takes no attention mask, so its attention cannot be "
                "measured with a window.",
                fix="use strategy: sensitivity",
            )
        hidden = self._inputs[layer]
        mask = window_mask(hidden.shape[1]).to(hidden)
        narrow = replace(call, kwargs={**call.kwargs, "attention_mask": mask})
        calls = [*self._calls[id(self.teacher)][:layer], narrow]
        return self.run(self._base, layer + 1, run_block(self.teacher, layer, hidden, calls))

    def _check_chain(self) -> None:
        """Raise TapError unless the final norm of the blocks' result is what the model gives, on the first row."""
        whole = run_base(self.teacher, self.input_ids[:1])
        norm = self.teacher.final_norm
        self.rebase(frozenset())
        found = self.end[:1] if norm is None else norm(self.end[:1])
        # Rows of a batch may be summed in another order.
        tolerance = 256 * torch.finfo(whole.dtype).eps * max(1.0, float(whole.abs().max()))
        if not float((found - whole).abs().max()) <= tolerance:
            raise TapError(
                f"The blocks of {type(self.teacher.model).__name__} run one after another do not give what the model "
                "gives, so the effect of a single new mixer cannot be measured.",
                fix="choose the layers by a list, or by strategy: uniform",
            )
