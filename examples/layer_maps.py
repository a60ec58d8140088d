"""Layer maps of a smaller student compared: the same training, with other teacher layers for its layers to learn from.

python examples/layer_maps.py ./teacher text.txt --output runs/maps --steps 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig

import xarch_kd as xkd

MAPS = ("uniform", "last", "cka")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train one Mamba-2 student per layer map and return the rise of its held-out NLL over the teacher's, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("text")
    parser.add_argument("--output", type=Path, default=Path("runs/maps"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=2, help="layers of the student")
    given = parser.parse_args(arguments)
    teacher = AutoConfig.from_pretrained(given.teacher)
    student = {
        "model_type": "mamba2",
        "vocab_size": teacher.vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": given.layers,
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 32,
        "n_groups": 1,
        "tie_word_embeddings": False,
    }
    gaps = {}
    for name in MAPS:
        entry = {
            "name": "stream",
            "tap": "hidden",
            "layers": name,
            "loss": {"kind": "cosine"},
            "projector": "linear",
        }
        mapping = {
            "version": 1,
            "teacher": {"model": given.teacher},
            "student": {"config": student, "head": "closed_form"},
            "data": {"files": [given.text], "sequence_length": given.length, "batch_size": 4},
            "stages": [
                {
                    "name": "distil",
                    "steps": given.steps,
                    "train": ["all"],
                    "align": [entry],
                    "tokens": {"divergence": "forward_kl"},
                }
            ],
            "evaluate": {"suites": ["likelihood"], "tokens": 4096},
        }
        gaps[name] = xkd.train(xkd.plan(mapping), given.output / name).metrics["held-out/difference"]
    for name, gap in sorted(gaps.items(), key=lambda item: item[1]):
        print(f"{name}: {gap:+.3f} nats per token")
    return gaps


if __name__ == "__main__":
    main()
