"""Files for the examples in docstrings: a tiny teacher, some text, and a mapping file for both."""

from __future__ import annotations

from pathlib import Path

from xarch_kd.testing.mapping import TEXT
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

MAPPING = """\
version: 1
teacher: {model: teacher}
student: {convert: {mixer: mamba2, replace: [1]}}
data: {files: [text.txt], sequence_length: 16, batch_size: 2}
device: cpu
stages:
  - name: mixers
    steps: 2
    train: [mixers]
    inputs: teacher
    align: [{name: output, tap: mixer_output, layers: replaced, loss: {kind: relative_mse}}]
evaluate: {suites: [likelihood, speed], tokens: 64}
"""


def write_example_files(folder: str | Path = ".") -> None:
    """Write `teacher/` (a tiny Llama and its tokenizer), `text.txt` and `mapping.yaml` into a folder."""
    root = Path(folder)
    tiny_model("llama").save_pretrained(root / "teacher")
    tiny_tokenizer().save_pretrained(root / "teacher")
    (root / "text.txt").write_text("".join(f"{number}. {TEXT}" for number in range(40)), encoding="utf-8")
    (root / "mapping.yaml").write_text(MAPPING, encoding="utf-8")
