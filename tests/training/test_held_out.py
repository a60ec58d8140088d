"""Held-out figures over several processes, the record of the best, and what features are kept."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.test_aligner import plan_of
from xarch_kd.data.batches import Batch
from xarch_kd.errors import CheckpointError, DataError
from xarch_kd.mapping_file.training import StageEvaluation
from xarch_kd.run.progress import HeldOutFigures
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import MemoryCache
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer
from xarch_kd.training.aligner import Aligner
from xarch_kd.training.held_out import HeldOut, Record, read_record

STAGE = {
    "align": [{"name": "h", "tap": "hidden", "layers": "same", "loss": {"kind": "relative_mse"}}],
    "tokens": {"divergence": "forward_kl"},
    "evaluation": {"every": 1, "batches": 2, "keep": "best"},
}
SETTINGS = StageEvaluation(every=1, batches=2, keep="best")


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def held_out_of(folder: Path, *, rank: int = 0, ranks: int = 1) -> tuple[HeldOut, Aligner]:
    student = tiny_model("llama")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    aligner = Aligner(plan_of(folder, STAGE, model=str(folder)), teacher=tiny_model("llama"), student=student)
    ids = torch.randint(0, 90, (8, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[3, 9:] = mask[6, 5:] = False
    batches = [Batch(input_ids=ids[at], attention_mask=mask[at]) for at in (slice(0, 4), slice(4, 8))]
    return HeldOut(aligner, aligner.reader.layout, batches, SETTINGS, seed=0, rank=rank, ranks=ranks), aligner


def test_two_processes_measure_what_one_does(teacher_path: Path) -> None:
    expected = held_out_of(teacher_path)[0].measure(1, lambda vector: vector)
    meeting = threading.Barrier(2)
    given: dict[int, Tensor] = {}
    found: dict[int, HeldOutFigures] = {}

    def run(rank: int, held_out: HeldOut) -> None:
        def summed(vector: Tensor) -> Tensor:
            given[rank] = vector
            meeting.wait(timeout=60)
            total = given[0] + given[1]
            meeting.wait(timeout=60)
            return total

        found[rank] = held_out.measure(1, summed)

    threads = [
        threading.Thread(target=run, args=(rank, held_out_of(teacher_path, rank=rank, ranks=2)[0])) for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert found[0].nll == pytest.approx(expected.nll, rel=1e-6)
    assert found[0].parts == pytest.approx(expected.parts, rel=1e-5)


def test_measuring_leaves_modes_and_random_numbers_alone(teacher_path: Path) -> None:
    held_out, aligner = held_out_of(teacher_path)
    aligner.train()
    aligner.student.get_submodule("model.layers.1").eval()
    modes = [part.training for part in aligner.modules()]
    before = torch.get_rng_state()
    held_out.measure(1, lambda vector: vector)
    assert [part.training for part in aligner.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_weights_survive_a_checkpoint(teacher_path: Path, tmp_path: Path) -> None:
    held_out, aligner = held_out_of(teacher_path)
    best = {name: value.clone() for name, value in aligner.trained_state().items()}
    assert held_out.observe(held_out.measure(1, lambda vector: vector))
    with torch.no_grad():
        for parameter in aligner.student.parameters():
            parameter.mul_(1.5)
    assert not held_out.observe(held_out.measure(2, lambda vector: vector))
    held_out.save(tmp_path)
    resumed, other = held_out_of(teacher_path)
    resumed.load(tmp_path)
    assert resumed.record == Record(best_step=1, best_value=held_out.record.best_value, since_best=1)
    with torch.no_grad():
        for parameter in other.student.parameters():
            parameter.zero_()
    assert resumed.restore_best() == 1
    assert all(torch.equal(value, best[name]) for name, value in other.trained_state().items())
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors cannot be read"):
        resumed.load(tmp_path)


def test_the_record_counts_evaluations_since_the_best() -> None:
    record = Record()
    for step, value in enumerate((3.0, 2.0, 2.0, 2.5), start=1):
        record = record.after(step, value)
    assert record == Record(best_step=2, best_value=2.0, since_best=2)
    assert record.is_exhausted(2) and not record.is_exhausted(3) and not record.is_exhausted(None)


def test_a_record_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"held_out\.json"):
        read_record(tmp_path)


def test_text_without_a_token_to_predict_is_refused(teacher_path: Path) -> None:
    aligner = held_out_of(teacher_path)[1]
    nothing = Batch(input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 4, dtype=torch.bool))
    for batches in ([], [nothing]):
        with pytest.raises(DataError, match="there is none") as caught:
            HeldOut(aligner, aligner.reader.layout, batches, SETTINGS, seed=0)
        assert "data.held_out" in str(caught.value.fix)


def test_a_cache_with_a_limit_keeps_what_fits() -> None:
    cache, site = MemoryCache(limit=100), Site("hidden", 0)
    cache.put("first", {site: torch.ones(16)})
    cache.put("second", {site: torch.ones(16)})
    assert cache.get("second") is None
    # What is kept already does not count twice.
    cache.put("first", {site: torch.zeros(20)})
    kept = cache.get("first")
    assert kept is not None and torch.equal(kept[site], torch.zeros(20))  # type: ignore[arg-type]
