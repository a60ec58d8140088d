"""A process that is killed at any file operation of a save leaves a whole checkpoint to resume from."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import safe_open

from xarch_kd import files
from xarch_kd.files import sha256_of
from xarch_kd.job.train import train
from xarch_kd.testing.mapping import MIXER_STAGE, Write
from xarch_kd.testing.runs import same, student_of
from xarch_kd.training.checkpoints import newest_whole
from xarch_kd.training.trainer import StageTrainer

KILLED = 137
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")


class Killer:
    """Ends this process at the `at`-th file operation below `folder`: before it, or in the middle of a write."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.seen = str(folder), at, 0
        sys.addaudithook(self.hook)
        write, flush = safetensors.torch.save_file, files._flush
        safetensors.torch.save_file = lambda tensors, path, metadata: self.torn(path, write, tensors, path, metadata)
        files._flush = lambda path: self.torn(None, flush, path)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(self.folder):
            self.count()

    def torn(self, path: Any, function: Any, *arguments: Any) -> None:
        """Call a function that writes a file; killed, half of the file is there."""
        if self.seen + 1 == self.at and path is not None:
            function(*arguments)
            os.truncate(path, Path(path).stat().st_size // 2)
        self.count()
        function(*arguments)

    def count(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            os._exit(KILLED)


def contents(checkpoint: Path) -> dict[str, str]:
    """Return a hash of each file; of tensors that of names, shapes and bytes, as their header has no fixed order."""
    found = {path.name: sha256_of(path) for path in checkpoint.glob("*.json") if path.name != files.CHECKSUM_FILE}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata()[files.CHECKSUM]
    return found


def test_a_kill_at_every_file_operation_of_a_save_leaves_a_whole_checkpoint(
    write_mapping: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kill is in a fork; what it leaves is the checkpoint before or the new one, bit for bit."""
    save = StageTrainer._save_checkpoint
    left: list[tuple[str, dict[str, str]]] = []
    wanted: dict[str, dict[str, str]] = {}

    def saved(self: StageTrainer, model: Any, trial: Any) -> None:
        stage = Path(str(self.args.output_dir))
        if self.state.global_step == 3:
            before, at = shutil.copytree(stage, tmp_path / "before"), 0
            while True:
                at += 1
                state, child = random.getstate(), os.fork()
                if child == 0:
                    # A fork begins with other random numbers.
                    random.setstate(state)
                    Killer(stage, at)
                    save(self, model, trial)
                    os._exit(0)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert code in (0, KILLED)
                newest, _ = newest_whole(stage)
                assert newest is not None
                left.append((newest.name, contents(newest)))
                shutil.rmtree(stage)
                shutil.copytree(before, stage)
                if code == 0:
                    break
        save(self, model, trial)
        wanted.update((path.name, contents(path)) for path in stage.glob("checkpoint-*"))

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", saved)
    mapping = write_mapping({**MIXER_STAGE, "steps": 4, "checkpoint_every": 1})
    train(mapping, tmp_path / "run")
    monkeypatch.undo()
    assert all(found == wanted[name] for name, found in left)
    assert {name for name, _ in left} == {"checkpoint-2", "checkpoint-3"} and left[-1][0] == "checkpoint-3"
    assert len(left) > 30
    with capsys.disabled():
        print(f"\n{len(left) - 1} file operations of a save, the process killed at each: a whole checkpoint is left")
    train(mapping, tmp_path / "whole")
    assert same(student_of(tmp_path / "run"), student_of(tmp_path / "whole"))
