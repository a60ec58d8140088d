"""Results of an evaluation that is not finished, so that an interrupted one continues after its last suite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from xarch_kd.data.batches import Batch
from xarch_kd.errors import DataError
from xarch_kd.evaluation.likelihood_suite import token_fingerprint
from xarch_kd.evaluation.results import Evaluation, from_json, to_json
from xarch_kd.files import sha256_of, write_text
from xarch_kd.mapping_file.schema import Evaluate
from xarch_kd.run.folder import RunFolder


class PartialResults:
    """Results by suite in `evaluation.partial.json` of a run, for one key: what they were measured with and on."""

    def __init__(self, folder: RunFolder, key: str) -> None:
        self.path = folder.root / "evaluation.partial.json"
        self.key = key
        self.results: dict[str, Any] = {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["key"] == key:
                self.results = dict(from_json(json.dumps(data["evaluation"])).results)
        except (OSError, ValueError, KeyError, TypeError, DataError):
            # Missing, cut short or of another version: everything is measured again.
            self.results = {}

    def add(self, name: str, result: Any) -> None:
        """Record the result of a suite."""
        self.results[name] = result
        whole = Evaluation(teacher="", student="", level=0.0, resamples=0, seed=0, results=self.results)
        write_text(self.path, json.dumps({"key": self.key, "evaluation": json.loads(to_json(whole))}))

    def remove(self) -> None:
        """Remove the file: the results are in `evaluation.json`."""
        self.path.unlink(missing_ok=True)


def evaluation_key(
    folder: RunFolder, settings: Evaluate, seed: int, teacher: str, texts: Mapping[str, Sequence[Batch]]
) -> str:
    """Return a hash of everything that the results of any suite depend on: settings, student, teacher, texts."""
    parts = {
        "settings": settings.model_dump(mode="json", exclude={"suites"}),
        "seed": seed,
        "teacher": teacher,
        "student": {file.name: sha256_of(file) for file in sorted(folder.student.glob("*.safetensors"))},
        "texts": {name: token_fingerprint(batches) for name, batches in texts.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
