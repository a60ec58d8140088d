"""A first mapping file for a teacher, written so that `plan` accepts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from xarch_kd.errors import UsageError
from xarch_kd.files import write_text
from xarch_kd.models.conversion.layer_selection import kept_layers
from xarch_kd.models.conversion.recipes import RECIPES
from xarch_kd.models.loading.load import load_config

TEMPLATE = """\
version: 1
teacher:
  model: {teacher}
{revision}  dtype: bfloat16
student:
  convert:
    mixer: {mixer}
    {selection}
data:                               # one of: builtin | files | dataset | mixture
  mixture:                          # e.g. - {{files: ["texts/*.txt"], weight: 0.5}}
    - {{builtin: python-docs, weight: 0.25}}
    - {{builtin: python-sources, weight: 0.25}}
    - {{builtin: copy, weight: 0.5}}  # lists to copy, without which new mixers lose copying
  sequence_length: {sequence_length}
  batch_size: 4
seed: 0
stages:
  - name: mixers                    # each new mixer learns to give what the attention it replaces gave
    steps: 120
    batches: 60                     # each is seen twice; the second time the teacher's features are in the cache
    train: [mixers]
    inputs: teacher
    cache: memory
    align:
      - name: mixer-output
        tap: mixer_output
        layers: replaced
        loss: {{kind: relative_mse, weight: 1.0}}
    optimizer: {{lr: 1.0e-2}}
  - name: logits                    # then all of them together learn the teacher's next-token distributions
    steps: 30
    batch_size: 2
    train: [mixers]
    tokens: {{divergence: forward_kl, temperature: 1.0}}
    optimizer: {{lr: 1.0e-3}}
evaluate:
  also:
    - builtin: licences             # texts of other kinds than the training text
    - builtin: library-docs
"""

# What may stand in YAML without quotes and stay the text that it is.
_PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9./:_-]*(?: [A-Za-z0-9]+)*")
_WORDS = {"true", "false", "null"}
_LIST = re.compile(r"\s*\[?\s*(\d+(?:\s*,\s*\d+)*)\s*\]?\s*")


def mapping_text(
    teacher: str,
    *,
    mixer: str = "mamba2",
    keep_attention: str | None = None,
    revision: str | None = None,
) -> str:
    """Return a mapping file that converts `teacher`; `keep_attention` is of the mapping file's language or `0, 4, 8`.

    By default half of the layers are replaced, chosen by measurement at the start of training.

    Only the teacher's config is read. Raises `ModelError` for a teacher that cannot be read, `UsageError` for blocks
    that it lacks or when every block would keep its attention.
    """
    if mixer not in RECIPES:
        raise UsageError("there is no conversion to this mixer", asked=mixer, allowed=", ".join(RECIPES))
    config = load_config(teacher, revision).get_text_config()
    depth = int(config.num_hidden_layers)  # type: ignore[arg-type]
    longest = getattr(config, "max_position_embeddings", None)
    return TEMPLATE.format(
        teacher=_scalar(teacher),
        revision=f"  revision: {json.dumps(revision)}\n" if revision is not None else "",
        mixer=mixer,
        selection=_selection(keep_attention, depth),
        sequence_length=min(256, longest) if isinstance(longest, int) else 256,
    )


def _selection(keep_attention: str | None, depth: int) -> str:
    """Return the line of the mapping file that selects layers. Raises `UsageError` if every block would stay as is."""
    if keep_attention is None:
        return f"replace: {{strategy: sensitivity, budget: {depth // 2}}}" if depth > 1 else "replace: all"
    listed = _LIST.fullmatch(keep_attention)
    selection = [int(number) for number in listed[1].split(",")] if listed else keep_attention
    if len(kept_layers(depth, keep_attention=selection)) == depth:
        raise UsageError(
            "every block would keep its attention, so nothing would be left to distil",
            asked=f"keep_attention: {keep_attention}, of {depth} blocks",
            fix='for example "every 4", or a list of the blocks that keep it',
        )
    return f"keep_attention: {_scalar(selection) if isinstance(selection, str) else selection}"


def write_mapping(path: Path, text: str) -> None:
    """Write a new mapping file. Raises `UsageError` if `path` exists: a file that someone wrote is never replaced."""
    if not path.parent.is_dir():
        raise UsageError("there is no such folder", asked=path.parent, fix=f"mkdir -p {path.parent}")
    write_text(path, text, overwrite=False)


def _scalar(text: str) -> str:
    """Return text as a YAML scalar: plain where that is safe, else in double quotes (JSON's are YAML's)."""
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not text.endswith(":")
    return text if is_plain else json.dumps(text, ensure_ascii=False)
