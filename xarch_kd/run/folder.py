"""The run folder: what a run writes, when it is unfinished, and when it is done."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from xarch_kd.errors import CheckpointError, UsageError
from xarch_kd.files import cannot_write, sha256_of, write_json, write_text
from xarch_kd.run.fingerprint import Fingerprint, changed_values

State = Literal["new", "unfinished", "finished"]
SHOWN_DIGITS: Final = 16
SHOWN_CHANGES: Final = 8


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. A folder without `manifest.json` is unfinished.

    With `is_owner=False`, as on ranks other than 0, nothing is written, locked or removed.
    """

    root: Path
    is_owner: bool = True

    @property
    def mapping(self) -> Path:
        """The mapping file as run."""
        return self.root / "mapping.yaml"

    @property
    def plan(self) -> Path:
        """The resolved plan as JSON, with the run's fingerprint."""
        return self.root / "plan.json"

    @property
    def calibration(self) -> Path:
        """Layer similarity of both models at the start, for layer maps that depend on it."""
        return self.root / "calibration.safetensors"

    @property
    def selection(self) -> Path:
        """Scores and choice of the layers of a conversion that chooses them by measurement."""
        return self.root / "selection.json"

    @property
    def events(self) -> Path:
        """One JSON object per line: the figures of each step, and the events between them."""
        return self.root / "events.jsonl"

    @property
    def student(self) -> Path:
        """The stock checkpoint of the student."""
        return self.root / "student"

    @property
    def mamba_ssm(self) -> Path:
        """The same student in mamba_ssm's format, if the mapping file requests it."""
        return self.root / "mamba_ssm"

    @property
    def head_map(self) -> Path:
        """The map of head inputs that the student's head starts from, if the mapping file requests it."""
        return self.root / "head_map.safetensors"

    @property
    def projectors(self) -> Path:
        """The projectors of every stage."""
        return self.root / "projectors.safetensors"

    @property
    def projector_reports(self) -> Path:
        """Diagnoses of the projectors of every stage."""
        return self.root / "projectors.json"

    @property
    def evaluation(self) -> Path:
        """Results of the evaluation."""
        return self.root / "evaluation.json"

    @property
    def mixing(self) -> Path:
        """Token-mixing matrices of a few layers and heads of both models, for the report."""
        return self.root / "mixing.safetensors"

    @property
    def report(self) -> Path:
        """The report as one HTML page."""
        return self.root / "report.html"

    @property
    def manifest(self) -> Path:
        """SHA-256 of every other file; written last."""
        return self.root / "manifest.json"

    def stage(self, name: str) -> Path:
        """The folder of one stage, e.g. `stages/01-mixers`."""
        return self.root / "stages" / name

    def state(self, fingerprint: str, mapping: Mapping[str, Any] | None = None) -> State:
        """Return whether the folder is new, or holds this run unfinished or finished.

        Raises UsageError when it holds something else, or a run of another mapping file, of whose content `mapping` the
        differing keys are named; CheckpointError for a damaged plan.json.
        """
        if not self.root.exists():
            return "new"
        if not self.root.is_dir():
            raise UsageError("the output is not a folder", asked=self.root, fix="give another --output")
        # The lock is the only thing that may stand in a folder before its plan does.
        inside = sorted(path.name for path in self.root.iterdir() if path.name != "run.lock")
        if not inside:
            return "new"
        plan = self._recorded_plan()
        recorded = plan.get("fingerprint")
        if recorded is None:
            raise UsageError(
                "the output folder holds something else than a run",
                asked=self.root,
                found=", ".join(inside[:5]) + (", …" if len(inside) > 5 else ""),
                allowed="a new or empty folder, or one that this mapping file's run was started in",
                fix="give another --output; nothing was changed",
            )
        if recorded != fingerprint:
            lines = [f"a run of mapping {recorded[:12]}, this one is {fingerprint[:12]}"]
            lines += changed_values(plan.get("mapping"), mapping) if mapping is not None else []
            rest = [f"… and {len(lines) - SHOWN_CHANGES} more"] if len(lines) > SHOWN_CHANGES else []
            raise UsageError(
                "the output folder holds the run of another mapping file",
                asked=self.root,
                found="\n           ".join([*lines[:SHOWN_CHANGES], *rest]),
                fix=f"give another --output, or compare with {self.mapping}; nothing was changed",
            )
        return "finished" if self.manifest.exists() else "unfinished"

    def _recorded_plan(self) -> dict[str, Any]:
        """Return plan.json, empty if there is none. Raises CheckpointError if it is damaged."""
        try:
            value = json.loads(self.plan.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "plan.json of the run is damaged, so that the run cannot be compared with this one",
                asked=self.plan,
                found=str(error),
                fix="restore it from a copy, or give another --output; nothing was changed",
            ) from None
        return value if isinstance(value, dict) else {}

    def recorded(self) -> Fingerprint | None:
        """Return what the run was made from when it started, None for a new folder or one of an older version."""
        return Fingerprint.from_dict(self._recorded_plan().get("made_from"))

    def start(self, source: str, plan: Mapping[str, Any], fingerprint: str, made_from: Fingerprint) -> None:
        """Write what identifies the run: `fingerprint` is that of its mapping file, `made_from` that of all inputs."""
        if not self.is_owner:
            return
        write_text(self.mapping, source)
        write_json(self.root / "environment.json", environment())
        write_json(self.plan, {"fingerprint": fingerprint, "made_from": made_from.as_dict(), **plan})

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event. Raises CheckpointError when the disk is full."""
        if not self.is_owner:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields})
        try:
            with self.events.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(self.events, error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this run. Raises UsageError when another run does."""
        if not self.is_owner:
            yield
            return
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        lock = self.root / "run.lock"
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    "another run is working in the output folder",
                    asked=self.root,
                    fix="wait for it, or give another --output",
                ) from error
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
                # A run that failed before it wrote anything leaves nothing behind.
                for path in made:
                    if path.is_dir() and not any(path.iterdir()):
                        path.rmdir()

    def finish(self) -> None:
        """Write the manifest: the run is done. Logs of W&B, whose own process may still write them, are left out."""
        if not self.is_owner:
            return
        files = sorted(
            path
            for path in self.root.rglob("*")
            if path.is_file()
            and path.name not in ("manifest.json", "run.lock")
            and path.relative_to(self.root).parts[0] != "wandb"
        )
        self._write_manifest({str(path.relative_to(self.root)): sha256_of(path) for path in files})

    def update_manifest(self, *written: Path) -> None:
        """Put files of a finished run that were just written into its manifest; all others keep their hashes."""
        if self.is_owner:
            own = {str(path.relative_to(self.root)): sha256_of(path) for path in written}
            self._write_manifest(dict(sorted({**self._manifest(), **own}.items())))

    def verify(self, *paths: Path) -> None:
        """Raise CheckpointError naming the first file of a finished run, at or under `paths`, that the manifest denies.

        Files that the manifest lists and that are missing count. An unfinished run has no manifest: nothing is checked.
        """
        if not self.manifest.exists():
            return
        wanted = [str(path.relative_to(self.root)) for path in paths]
        for name, digest in self._manifest().items():
            if not any(name == path or name.startswith(f"{path}/") for path in wanted):
                continue
            try:
                found = sha256_of(self.root / name)
            except OSError as error:
                found = f"no such file ({error.strerror})"
            if found != digest:
                raise CheckpointError(
                    f"{name} is not the file that the run wrote",
                    asked=self.root / name,
                    found=f"sha256 {found[:SHOWN_DIGITS]}" if len(found) == len(digest) else found,
                    allowed=f"sha256 {digest[:SHOWN_DIGITS]}, as {self.manifest.name} lists it",
                    fix="restore it from a copy, or train again with another --output"
                    if name != self.evaluation.name
                    else f"measure again: xarch-kd evaluate {shlex.quote(str(self.root))}",
                )

    def _manifest(self) -> dict[str, str]:
        """Return the hash of each file. Raises CheckpointError for a damaged manifest."""
        try:
            files = json.loads(self.manifest.read_text(encoding="utf-8"))["files"]
            return {str(name): str(digest) for name, digest in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "the manifest of the run is damaged, so that its files cannot be checked",
                asked=self.manifest,
                found=f"{type(error).__name__}: {error}",
                fix="restore it from a copy, or train again with another --output",
            ) from None

    def _write_manifest(self, digests: Mapping[str, str]) -> None:
        write_json(self.manifest, {"files": dict(digests)})

    @contextmanager
    def working_directory(self) -> Iterator[None]:
        """Work where the run was trained, so that relative paths of its mapping file mean the same files.

        Where that folder no longer exists, or is not recorded, nothing changes. The root must be an absolute path.
        """
        recorded = self.recorded()
        place = Path(recorded.working_directory) if recorded is not None else Path.cwd()
        with chdir(place) if place.is_dir() else nullcontext():
            yield

    def drop(self, folder: Path) -> None:
        """Remove a folder inside the run folder that is no longer needed."""
        if self.is_owner and folder.is_dir() and self.root.resolve() in folder.resolve().parents:
            shutil.rmtree(folder)


def environment() -> dict[str, Any]:
    """Return the versions and the machine that a figure depends on."""
    import numpy
    import safetensors
    import torch
    import transformers

    import xarch_kd

    return {
        "xarch_kd": xarch_kd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
