from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xarch_kd.errors import CheckpointError, ModelError, UsageError
from xarch_kd.files import read_tensors, write_file, write_folder, write_json, write_tensors, write_text


def test_what_is_written_is_read_back_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "new" / "folder"
    write_text(root / "a.txt", "ä\n")
    write_json(root / "b.json", {"ü": 1})
    write_tensors(root / "c.safetensors", {"x": torch.arange(6.0).view(2, 3).T})
    assert (root / "a.txt").read_bytes() == "ä\n".encode()
    assert (root / "b.json").read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'
    assert load_file(root / "c.safetensors")["x"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert sorted(path.name for path in root.iterdir()) == ["a.txt", "b.json", "c.safetensors"]


def test_tensors_are_read_back_bit_for_bit_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.tensor(2), "d": torch.empty(0, 3)}
    write_tensors(path, tensors, {"key": "k"})
    found, metadata = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert metadata == {"key": "k"}
    content = path.read_bytes()
    for position in (3, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"x\.safetensors (is damaged|cannot be read)"):
            read_tensors(path)
    for wrong in (b"", content[:50], content + b"0"):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
            read_tensors(path)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="has no checksum"):
        read_tensors(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("error", "found", "fix"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on the disk", "free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left", "free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", "is writable"),
        (RuntimeError("odd"), "odd", "before are intact"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_that_fails_leaves_the_old_one(
    tmp_path: Path, kind: str, error: Exception, found: str, fix: str
) -> None:
    path = tmp_path / "thing"

    def write(target: Path, text: str = "old") -> None:
        if kind == "folder":
            target.mkdir()
        (target / "inside" if kind == "folder" else target).write_text(text)

    def half(target: Path) -> None:
        write(target, "ha")
        raise error

    def writer(with_: Callable[[Path], object]) -> None:
        write_file(path, with_) if kind == "file" else write_folder(path, with_, overwrite=True)

    writer(write)
    with pytest.raises(CheckpointError, match=rf"cannot write thing[\s\S]*{found}[\s\S]*{fix}") as refused:
        writer(half)
    assert refused.value.exit_code == 3
    assert (path / "inside" if kind == "folder" else path).read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["thing"]


def test_a_disk_that_fills_while_it_is_flushed_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "plan.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        write_text(tmp_path / "plan.json", "new")
    assert (tmp_path / "plan.json").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_appears_while_a_new_one_is_written_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"

    def write(target: Path) -> None:
        target.write_text("mine")
        path.write_text("another's")

    with pytest.raises(UsageError, match="exists and is left as it is"):
        write_file(path, write, overwrite=False)
    assert path.read_text() == "another's"
    assert [file.name for file in tmp_path.iterdir()] == ["map.yaml"]


def test_the_reason_that_a_writer_refuses_for_is_kept(tmp_path: Path) -> None:
    def refuse(target: Path) -> None:
        raise ModelError("not finite")

    for call in (write_file, write_folder):
        with pytest.raises(ModelError, match="not finite"):
            call(tmp_path / "thing", refuse)
    assert list(tmp_path.iterdir()) == []
