from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xarch_kd.job.fingerprint import mapping_fingerprint
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.models.loading.load import fresh_model
from xarch_kd.planning import cost
from xarch_kd.planning.cost import EFFICIENCY, HALF_GAIN, PROCESS_BYTES, Rates, StageWork, measured_rates, stage_cost
from xarch_kd.planning.models import ModelHandle
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.testing.tiny import tiny_config

ROWS, TIME = 2, 48
FOREVER = {"name": "s", "steps": 1, "train": ("all",)}


def side(model_type: str, **overrides: Any) -> ModelHandle:
    return ModelHandle.of("tiny", tiny_config(model_type, **overrides), None, "float32")


def work(student: ModelHandle, stage: dict[str, Any], **values: Any) -> StageWork:
    defaults: dict[str, Any] = {
        "stage": Stage.model_validate({**FOREVER, **stage}),
        "rows": ROWS,
        "time": TIME,
        "teacher_blocks": 0,
        "teacher_passes": 0,
        "student_blocks": tuple(range(student.depth)),
        "mixers_alone": False,
        "student_passes": 1,
        "trainable": frozenset(student.names.values()),
        "projector_parameters": 0,
        "cache_bytes": 0,
    }
    return StageWork(**{**defaults, **values})


HIDDEN = {"align": ({"name": "a", "tap": "hidden", "layers": "same"},)}
TOKENS = {"tokens": {"weight": 1.0}}


# torch counts the whole square of attention where the estimate counts the causal half, and none of the elementwise work
# that a scan does; both are a few percent here.
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "bamba", "mamba2"])
def test_flops_of_a_pass_agree_with_those_that_torch_counts(model_type: str, rates: Rates) -> None:
    config = tiny_config(model_type)
    model = fresh_model(config, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.zeros(ROWS, TIME, dtype=torch.long), use_cache=False)
    student = ModelHandle.of("tiny", config, None, "float32")
    forward = stage_cost(work(student, HIDDEN, trainable=frozenset()), student, student, rates).flops
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_a_backward_pass_costs_twice_the_forward_pass_when_everything_trains(rates: Rates) -> None:
    student = side("llama")
    forward = stage_cost(work(student, HIDDEN, trainable=frozenset()), student, student, rates).flops
    both = stage_cost(work(student, HIDDEN), student, student, rates).flops
    # Attention's own products have no weight, so a little less than three times.
    assert 2.8 * forward < both < 3 * forward


def test_only_blocks_above_the_lowest_trained_one_run_backward(rates: Rates) -> None:
    student = side("llama", num_hidden_layers=4)
    last = frozenset(name for name in student.names.values() if ".layers.3." in name)
    forward = stage_cost(work(student, HIDDEN, trainable=frozenset()), student, student, rates).flops
    trained = stage_cost(work(student, HIDDEN, trainable=last), student, student, rates).flops
    assert 1.45 * forward < trained < 1.5 * forward
    checkpointed = {**HIDDEN, "gradient_checkpointing": True}
    again = stage_cost(work(student, checkpointed, trainable=last), student, student, rates).flops
    assert again == pytest.approx(trained + forward / 4)


def test_heads_cost_when_tokens_are_compared(rates: Rates) -> None:
    student = side("llama", tie_word_embeddings=False)
    mixers = frozenset(name for name in student.names.values() if "self_attn" in name)
    options: dict[str, Any] = {"trainable": mixers, "teacher_passes": 1}
    without = stage_cost(work(student, HIDDEN, **options), student, student, rates).flops
    with_tokens = stage_cost(work(student, TOKENS, **options), student, student, rates).flops
    assert with_tokens - without == pytest.approx(ROWS * TIME * 2 * 97 * 64 * (1 + 3))


def test_seconds_are_flops_over_the_rate_that_passes_reach(rates: Rates) -> None:
    student = side("llama")
    cost = stage_cost(work(student, HIDDEN), student, student, rates)
    assert cost.seconds == pytest.approx(cost.flops / (1e11 * EFFICIENCY))


def test_peak_bytes_hold_both_models_the_optimizer_and_a_cache_in_memory(rates: Rates) -> None:
    student = side("llama")
    count = sum(parameter.numel() for parameter in student.layout.model.parameters())
    frozen = stage_cost(work(student, HIDDEN, trainable=frozenset()), student, student, rates).peak_bytes
    assert frozen == PROCESS_BYTES + 2 * 4 * count
    trained = stage_cost(work(student, HIDDEN), student, student, rates).peak_bytes
    activations = 4 * ROWS * TIME * student.depth * (8 * 64 + 4 * student.config.get_text_config().intermediate_size)
    assert trained == frozen + 3 * 4 * count + activations
    for place, added in (("memory", 1000), ("disk", 0)):
        stage = {**HIDDEN, "inputs": "teacher", "cache": place}
        costs = [
            stage_cost(work(student, stage, cache_bytes=size), student, student, rates).peak_bytes for size in (0, 1000)
        ]
        assert costs[1] - costs[0] == added


def test_a_cached_teacher_runs_once_a_distinct_batch(plan_of: Callable[[str], Plan], folder_of: Any, good: str) -> None:
    text = good.replace("./teacher", folder_of("llama", num_hidden_layers=4)).replace("steps: 4", "steps: 40")
    cached = plan_of(text.replace("cache: memory", "cache: memory\n    batches: 4")).stages[0]
    fresh = plan_of(text.replace("cache: memory", "cache: off\n    batches: 4")).stages[0]
    assert (cached.distinct_batches, cached.tokens) == (4, fresh.tokens)
    student = cached.flops - (fresh.flops - cached.flops) * 4 / 36
    assert 0 < student < cached.flops < fresh.flops


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """A process that has measured no rate, before and after."""
    cost._product_rate.cache_clear()
    yield
    cost._product_rate.cache_clear()


@pytest.mark.usefixtures("unmeasured")
def test_a_slow_product_is_timed_once_and_at_a_small_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def slow(left: torch.Tensor, right: torch.Tensor) -> float:
        sizes.append(left.shape[0])
        return 2 * left.shape[0] ** 3 / 1e9

    monkeypatch.setattr(cost, "_seconds_of_product", slow)
    for _ in range(2):
        assert measured_rates("cpu", []).per_second == {"float32": pytest.approx(1e9 * torch.get_num_threads())}
    assert sizes == [192] * 3


def test_rates_are_measured_and_half_precision_is_capped() -> None:
    assert set(measured_rates("cpu", ["float32"]).per_second) == {"float32"}
    rates = measured_rates("cpu", ["float16", "bfloat16"])
    assert set(rates.per_second) == {"float32", "bfloat16", "float16"}
    assert rates.per_second["float16"] == rates.per_second["float32"]
    assert rates.per_second["float32"] > 1e8
    assert rates.per_second["bfloat16"] <= HALF_GAIN["cpu"] * rates.per_second["float32"]
    assert "GFLOP/s" in rates.timing_assumptions


@pytest.mark.parametrize(("half", "chosen"), [(2e11, "bfloat16"), (0.5e11, "float32")])
def test_auto_is_the_faster_of_two_precisions_and_stays_what_it_was(
    half: float, chosen: str, good: str, tmp_path: Path, folder_of: Callable[..., str]
) -> None:
    path = tmp_path / "map.yaml"
    good = good.replace("./teacher", folder_of("llama", num_hidden_layers=4))
    named = good.replace("dtype: bfloat16", "dtype: auto").replace(
        "inputs: teacher", "inputs: teacher\n    precision: auto"
    )
    assert named.count(": auto") == 2
    path.write_text(named, encoding="utf-8")
    rates = Rates("cpu", {"float32": 1e11, "bfloat16": half})
    found = make_plan(path, rates=rates)
    assert [found.teacher.dtype, *(stage.stage.precision for stage in found.stages)] == [chosen, chosen, "float32"]
    # Resuming compares the mapping that a run was made from, with what auto was then.
    path.write_text(named.replace(": auto", f": {chosen}"), encoding="utf-8")
    assert mapping_fingerprint(found) == mapping_fingerprint(make_plan(path, rates=rates))
