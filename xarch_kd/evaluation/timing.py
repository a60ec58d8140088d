"""Times of prefill and decoding of two models, measured alternately, with an estimate of their cost in advance."""

from __future__ import annotations

import importlib.util
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import psutil
import torch
import transformers
from torch import Tensor, nn

from xarch_kd.errors import ModelError
from xarch_kd.models.cache_size import LayerCache, cache_size, measured_size
from xarch_kd.models.loading.load import cast_parameters
from xarch_kd.planning.render import duration
from xarch_kd.run.report import Reporter, Work
from xarch_kd.taps.layout import Layout

VERSION: Final = 1
# Tokens of the passes before the first measurement, which also give the estimate of the cost.
WARM_UP: Final = 128
# Decoded tokens per context, after one that is not counted.
STEPS: Final = 12
MOST_REPEATS: Final = 5
# For the estimate: attention reaches a third of the rate of other products, and a decoded token costs
# seven times the cache's share of the weights (passes of transformers with SmolLM2-135M in bfloat16 on two CPU cores).
ATTENTION_FACTOR, CACHE_READS = 3.0, 7.0
# Share of the available memory that one context may take.
MEMORY_SHARE: Final = 0.7
SAMPLE_SECONDS: Final = 0.005
KERNELS: Final = ("mamba_ssm", "causal_conv1d", "fla")
# Raised by model classes and by torch for a cache, a dtype or a length that they do not support.
CANNOT_RUN: Final = (RuntimeError, ValueError, TypeError, AttributeError, ModelError)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median of `repeats` times in seconds, with their quartiles."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Return the timing of these repeats."""
        low, median, high = (float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
        return cls(median=median, low=low, high=high, repeats=len(seconds))


@dataclass(frozen=True, kw_only=True)
class ContextTimes:
    """Measurements of one model after `tokens` tokens: `decode` is per token, `measured_bytes` those of the cache."""

    tokens: int
    prefill: Timing
    decode: Timing
    measured_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of teacher and student by context length, and a sentence for each length that was left out."""

    contexts: Mapping[int, tuple[ContextTimes, ContextTimes]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


class Side:
    """One model as `generate` runs it: with a cache, positions, and logits of the last token alone.

    Its parameters are rounded to `dtype` in place, unless some are quantized. `cache_bytes` returns the bytes of its
    cache after so many tokens.
    """

    def __init__(self, name: str, layout: Layout, dtype: torch.dtype) -> None:
        self.name, self.model = name, layout.model
        self.is_quantized = _is_quantized(self.model)
        if not self.is_quantized:
            cast_parameters(self.model, dtype)
        self.dtype = next(value.dtype for value in self.model.parameters() if value.dtype.is_floating_point)
        self.device = self.model.device
        self.rows = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type]
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        self.attention_share = _attention_share(layout)
        self.layers: tuple[LayerCache, ...] | None = None
        accepted = inspect.signature(self.model.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of cache and state after `tokens` tokens, 0 if they are not known."""
        return 0 if self.layers is None else cache_size(self.layers, tokens, self.dtype)

    def prefill(self, ids: Tensor) -> tuple[float, Tensor, Any]:
        """Return the seconds of a pass over `ids` [1, time], the most likely next token [1, 1] and the cache.

        Raises ModelError if the model returns no cache.
        """
        return self._run(ids, None, 0)

    def decode(self, token: Tensor, cache: Any, start: int) -> tuple[float, Tensor]:
        """Return the seconds of a pass over one token after `start` tokens, and the next one; extends the cache."""
        seconds, following, _ = self._run(token, cache, start)
        return seconds, following

    @torch.inference_mode()
    def _run(self, ids: Tensor, cache: Any, start: int) -> tuple[float, Tensor, Any]:
        options: dict[str, Any] = {"use_cache": True}
        if self._takes_positions:
            # Some classes count positions from 0 in each call unless they are given.
            options["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        if self._takes_logits_to_keep:
            options["logits_to_keep"] = 1
        if cache is not None:
            options[self._cache_name] = cache
        self._wait()
        began = time.perf_counter()
        output: Any = self.model(ids, **options)
        token = output["logits"][:, -1:].argmax(-1)
        self._wait()
        seconds = time.perf_counter() - began
        found = output.get(self._cache_name)
        if found is None:
            raise ModelError(f"{type(self.model).__name__} returns no cache")
        return seconds, token, found

    def _wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _is_quantized(model: nn.Module) -> bool:
    """Return whether a model has codes instead of weights: tensors of torchao, or the packed ones of GPTQ and AWQ."""
    parameters = any(type(each.data) is not Tensor or not each.is_floating_point() for each in model.parameters())
    return parameters or any(hasattr(module, "qweight") for module in model.modules())


def _attention_share(layout: Layout) -> float:
    """Return the expected time of causal attention per token of context, as a share of all other products."""
    config: Any = layout.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = heads * (getattr(config, "head_dim", None) or layout.dim // max(heads, 1))
    others = sum(parameter.numel() for block in layout.blocks for parameter in block.parameters())
    return ATTENTION_FACTOR * layout.mixer_kinds.count("attention") * width / max(others, 1)


def signature_of(teacher: Side, student: Side) -> str:
    """Return what the times depend on, in one line."""
    device = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type
    dtypes = [str(side.dtype).removeprefix("torch.") for side in (teacher, student)]
    attention = [str(getattr(side.model.config, "_attn_implementation", None)) for side in (teacher, student)]
    kernels = [name for name in KERNELS if importlib.util.find_spec(name) is not None]
    parts = {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "/".join(dict.fromkeys(dtypes)),
        "weights": "teacher quantized" if teacher.is_quantized else "plain",
        "attention": "/".join(dict.fromkeys(attention)),
        "kernels": "+".join(kernels) or "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sequences": 1,
        "prefill": "one pass",
    }
    return "|".join([f"speed.v{VERSION}", *(f"{name}:{value}" for name, value in parts.items())])


def time_contexts(
    teacher: Side,
    student: Side,
    lengths: Sequence[int],
    *,
    seconds: float,
    longest: int | None,
    reporter: Reporter,
) -> Times:
    """Return the times of both models at those of `lengths` that fit into `seconds` and the memory, shortest first.

    Both models run in turn, so that a load of the machine meets both. `longest` is the number of positions. The
    expected cost is printed first.
    """
    try:
        bench = _Bench((teacher, student), longest)
    except CANNOT_RUN as error:
        return Times(notices=(f"times are not measured: {first_line(error)}",))
    repeats, notices = bench.schedule(lengths, seconds)
    if not repeats:
        return Times(notices=notices)
    shown = ", ".join(f"{length:,}" for length in repeats)
    cost = duration(bench.total(repeats))
    reporter.line(f"timing prefill and decoding of both models after {shown} tokens: about {cost}")
    found: dict[int, tuple[ContextTimes, ContextTimes]] = {}
    left_out = []
    began = time.perf_counter()
    total = sum(2 * (count * length + STEPS + 1) for length, count in repeats.items())
    with reporter.work("timing both models", total, "tokens") as work:
        for length in repeats:
            left = seconds - (time.perf_counter() - began)
            if found and bench.cost(length, 1) > left:
                left_out.append(f"{length:,} tokens are not timed: {_too_long(bench.cost(length, 1), seconds)}")
                continue
            later = bench.total({each: 1 for each in repeats if each > length})
            count = repeats[length]
            while count > 1 and bench.cost(length, count) + later > left:
                count -= 1
            try:
                found[length] = bench.measure(length, count, work)
            except CANNOT_RUN as error:
                left_out.append(f"{length:,} tokens are not timed: {first_line(error)}")
    return Times(contexts=found, notices=(*left_out, *notices))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    message = error.message if isinstance(error, ModelError) else str(error)
    return (message.strip().splitlines() or [type(error).__name__])[0]


def _too_long(expected: float, seconds: float) -> str:
    return f"about {duration(expected)} are more than is left of {seconds:g} s (evaluate.speed.seconds)"


class _Bench:
    """Both models, the estimate of their times, and the measurement of one context."""

    def __init__(self, sides: tuple[Side, Side], longest: int | None) -> None:
        self.sides, self.longest = sides, longest
        # Ratio of the last measured context to its estimate, and the memory per token that it took.
        self.correction, self.bytes_per_token = 1.0, 0.0
        self.rows = min(side.rows for side in sides)
        self.resident = psutil.Process().memory_info().rss
        length = WARM_UP if longest is None else max(1, min(WARM_UP, longest - 3))
        self.base: dict[str, tuple[float, float]] = {}
        for side in sides:
            ids = self._ids(side, length)
            side.prefill(ids)
            prefill, token, cache = side.prefill(ids)
            # The first decoded token is slower.
            _, token = side.decode(token, cache, length)
            decode, _ = side.decode(token, cache, length + 1)
            self.base[side.name] = (prefill / (length * (1 + side.attention_share * length)), decode)

    def cost(self, length: int, repeats: int) -> float:
        """Return the expected seconds of one context."""
        found = 0.0
        for side in self.sides:
            per_token, decode = self.base[side.name]
            found += repeats * per_token * length * (1 + side.attention_share * length)
            found += (STEPS + 1) * decode * (1 + CACHE_READS * side.cache_bytes(length) / side.weight_bytes)
        return found * self.correction

    def total(self, repeats: Mapping[int, int]) -> float:
        """Return the expected seconds of several contexts, given as length → repeats of the prefill."""
        return sum(self.cost(length, count) for length, count in repeats.items())

    def schedule(self, lengths: Sequence[int], seconds: float) -> tuple[dict[int, int], tuple[str, ...]]:
        """Return length → repeats that fit into `seconds`, and a sentence for each of the other lengths."""
        repeats: dict[int, int] = {}
        notices = []
        for length in lengths:
            if self.total({**repeats, length: 1}) > seconds:
                notices.append(f"{length:,} tokens are not timed: {_too_long(self.cost(length, 1), seconds)}")
            else:
                repeats[length] = 1
        for _ in range(MOST_REPEATS - 1):
            for length in repeats:
                more = {**repeats, length: repeats[length] + 1}
                if self.total(more) <= seconds:
                    repeats = more
        return repeats, tuple(notices)

    def measure(self, length: int, repeats: int, work: Work) -> tuple[ContextTimes, ContextTimes]:
        """Return the times at one context. Raises one of CANNOT_RUN for a length that does not fit into the memory."""
        needed, free = self.bytes_per_token * length, psutil.virtual_memory().available
        if self.sides[0].device.type != "cuda" and needed > MEMORY_SHARE * free:
            raise RuntimeError(f"about {needed / 2**30:.1f} GiB are more than the {free / 2**30:.1f} GiB that are free")
        expected, began = self.cost(length, repeats), time.perf_counter()
        # The last decoded token has a position too.
        length = length if self.longest is None else max(1, min(length, self.longest - STEPS - 1))
        prefills: dict[str, list[float]] = {side.name: [] for side in self.sides}
        peaks: dict[str, int] = {}
        states: dict[str, tuple[Tensor, Any]] = {}
        ids = {side.name: self._ids(side, length) for side in self.sides}
        for repeat in range(repeats):
            for side in self._order(repeat):
                states.pop(side.name, None)
                others = sum(measured_size(cache) for _, cache in states.values())
                with peak_memory(side, self.resident + others) as peak:
                    seconds, token, cache = side.prefill(ids[side.name])
                    states[side.name] = (token, cache)
                    peaks[side.name] = max(peaks.get(side.name, 0), peak())
                prefills[side.name].append(seconds)
                work.advance(length)
        sizes = {name: measured_size(cache) for name, (_, cache) in states.items()}
        decodes: dict[str, list[float]] = {side.name: [] for side in self.sides}
        for step in range(STEPS + 1):
            for side in self._order(step):
                token, cache = states[side.name]
                seconds, token = side.decode(token, cache, length + step)
                states[side.name] = (token, cache)
                decodes[side.name].append(seconds)
                work.advance()
        self.correction *= (time.perf_counter() - began) / expected
        self.bytes_per_token = max(peaks.values()) / length
        teacher, student = (
            ContextTimes(
                tokens=length,
                prefill=Timing.of(prefills[side.name]),
                decode=Timing.of(decodes[side.name][1:]),
                measured_bytes=sizes[side.name],
                peak_bytes=side.weight_bytes + peaks[side.name],
            )
            for side in self.sides
        )
        return teacher, student

    def _order(self, number: int) -> tuple[Side, ...]:
        """Return both models, the other one first each time."""
        return self.sides if number % 2 == 0 else self.sides[::-1]

    def _ids(self, side: Side, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.rows, (1, length), generator=generator).to(side.device)


@contextmanager
def peak_memory(side: Side, before: int) -> Iterator[Callable[[], int]]:
    """Yield a function that returns by how many bytes the memory was at most larger than `before`.

    On a GPU it is the allocator's own record; elsewhere the resident set of the process, read every 5 ms.
    """
    if side.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(side.device)
        held = torch.cuda.memory_allocated(side.device)
        yield lambda: torch.cuda.max_memory_allocated(side.device) - held
        return
    process, done, highest = psutil.Process(), threading.Event(), before

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLE_SECONDS):
            highest = max(highest, process.memory_info().rss)

    def peak() -> int:
        return max(highest, process.memory_info().rss) - before

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
