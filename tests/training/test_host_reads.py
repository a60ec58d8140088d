"""A training step reads the device a fixed number of times, however many pairs it has."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.training.test_aligner import plan_of
from tests.training.test_micro_batches import large_and_small
from xarch_kd.data.batches import Batch
from xarch_kd.mixing import checks as mixing_checks
from xarch_kd.ops.streaming import autograd, mixing_distance
from xarch_kd.run.signals import StopSignals
from xarch_kd.teacher.reader import TeacherFeatures
from xarch_kd.testing.reads import CountingReads
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.checkpoints import SOURCE_FILE
from xarch_kd.training.trainer import StageTrainer

DEPTH = 3
STEPS = 2
# Code that reads on a host alone (`test_what_is_not_counted…`), and the two parts of a step that are no reads of a
# device: AdamW's step counters are tensors of the host, and logging is counted apart.
HOST_ONLY = {
    ("xarch_kd/mixing/checks.py", "check_sign"): mixing_checks.check_sign,
    ("xarch_kd/mixing/checks.py", "check_valid_range"): mixing_checks.check_valid_range,
    ("xarch_kd/ops/streaming/mixing_distance.py", "_blocks"): mixing_distance._blocks,
    ("xarch_kd/ops/streaming/autograd.py", "backward"): autograd._AttachGradients.backward,
}
APART = {("torch/optim/adamw.py", "step"), ("torch/optim/adam.py", "step"), ("xarch_kd/training/trainer.py", "log")} | {
    ("transformers/trainer.py", name) for name in ("_maybe_log_save_evaluate", "_finalize_training")
}


def test_what_is_not_counted_reads_tensors_of_the_host_alone() -> None:
    for function in HOST_ONLY.values():
        assert '"cpu"' in inspect.getsource(function)


class Padded:
    """A source of one padded micro-batch after another, whose state is their number."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.drawn = batches, 0

    def draw(self) -> Batch:
        self.drawn += 1
        return self.batches[(self.drawn - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=DEPTH).requires_grad_(False)


@pytest.fixture(scope="module")
def teacher_folder(teacher: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trainer_of(folder: Path, teacher: PreTrainedModel, batches: list[Batch], layers: int, run: Path) -> StageTrainer:
    pairs = [{"student": layer, "teacher": layer} for layer in range(layers)]
    hidden = {"name": "h", "tap": "hidden", "layers": pairs, "loss": {"kind": "relative_mse"}}
    others = [
        {"name": name, "tap": tap, "layers": pairs, "loss": loss}
        for name, tap, loss in (
            ("m", "mixing", {"kind": "mixing", "distance": "kl", "heads": "learned"}),
            ("v", "values", {"kind": "relation"}),
            ("c", "hidden", {"kind": "cka"}),
        )
    ]
    stage = {
        "align": [hidden, *others],
        "tokens": {"divergence": {"kind": "jsd"}, "cross_entropy": 0.5},
        "steps": STEPS,
        "gradient_accumulation": len(batches),
    }
    plan = plan_of(folder, stage, model=str(folder))
    student = tiny_model("llama", seed=1, num_hidden_layers=DEPTH)
    aligner = Aligner(plan, teacher=teacher, student=student)
    reader = TeacherFeatures(aligner.reader.layout, aligner.targets().sites)
    return StageTrainer(
        aligner,
        reader,
        Padded(batches),
        plan.stages[0],
        folder=run,
        seed=0,
        cpu=True,
        tracking=(),
        signals=StopSignals("resume", lambda: ""),
    )


def reads_of(trainer: StageTrainer, monkeypatch: pytest.MonkeyPatch) -> list[list[list[tuple[str, str]]]]:
    """Return the reads of each step but the first."""
    marks: list[int] = []
    counter = CountingReads(frozenset(HOST_ONLY) | APART)
    drawing = StageTrainer.get_batch_samples

    def marking(self: StageTrainer, *given: Any) -> Any:
        marks.append(len(counter.found))
        return drawing(self, *given)

    with monkeypatch.context() as patched, counter:
        patched.setattr(StageTrainer, "get_batch_samples", marking)
        trainer.train()
    marks.append(len(counter.found))
    return [counter.found[first:last] for first, last in itertools.pairwise(marks[1:])]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_step_reads_the_device_as_often_with_1_layer_as_with_3(
    teacher_folder: Path, teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    large, small = large_and_small()
    batches = small if padded else [Batch(input_ids=large.input_ids)]
    counts = set()
    for layers in (1, DEPTH):
        trainer = trainer_of(teacher_folder, teacher, batches, layers, tmp_path / str(layers))
        steps = reads_of(trainer, monkeypatch)
        assert len(steps) == STEPS - 1
        for step in steps:
            # Models of transformers look at positions or a mask themselves, once per pass.
            ours = [read for read in step if not read[0][0].startswith("transformers/")]
            assert len(ours) == 1 and ours[0][0] == ("xarch_kd/ops/checks.py", "settle"), ours
            assert padded or len(step) <= 3, step
            counts.add(len(step))
    assert len(counts) == 1


def test_a_run_on_padded_micro_batches_has_the_loss_of_one_large_batch_and_saves_its_source(
    teacher_folder: Path, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    large, small = large_and_small()
    trainer = trainer_of(teacher_folder, teacher, small, 2, tmp_path)
    # CKA and the objective of learned heads are left out: they are ratios of sums over their own micro-batch.
    expected = {n: v for n, v in _parts(trainer.aligner, large).items() if n[0] != "c" and not n.endswith("-heads")}
    steps: list[dict[str, float]] = []
    trainer.log = lambda logs, start_time=None: steps.append({k: float(v) for k, v in trainer._figures.items()})  # type: ignore[method-assign]
    trainer.train()
    assert {n: steps[0][n] for n in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (tmp_path / f"checkpoint-{STEPS}" / SOURCE_FILE).read_text() == f'{{\n  "drawn": {STEPS * len(small)}\n}}\n'


def _parts(aligner: Aligner, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(part) for name, part in aligner(batch=batch).parts.items()}
