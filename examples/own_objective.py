"""An objective of one's own: the angle between the changes from token to token, beside a built-in divergence.

python examples/own_objective.py ./teacher text.txt --output runs/own
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import xarch_kd as xkd


def direction(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return 1 - cosine of the change of features [batch, time, dim] from each token to the next, mean over tokens."""
    changes = (side[:, 1:] - side[:, :-1] for side in (student, teacher))
    angle = 1 - torch.nn.functional.cosine_similarity(*changes, dim=-1)
    return angle.mean() if mask is None else angle[mask[:, 1:] & mask[:, :-1]].mean()


def main(arguments: list[str] | None = None) -> xkd.Run:
    """Train a hybrid with the objective and return the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("text")
    parser.add_argument("--output", default="runs/own")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    given = parser.parse_args(arguments)
    plan = xkd.plan(
        {
            "version": 1,
            "teacher": {"model": given.teacher},
            "student": {"convert": {"mixer": "mamba2", "keep_attention": "every 2"}},
            "data": {"files": [given.text], "sequence_length": given.length, "batch_size": 4},
            "stages": [
                {
                    "name": "directions",
                    "steps": given.steps,
                    "train": ["mixers"],
                    "align": [
                        {
                            "name": "direction",
                            "tap": "hidden",
                            "layers": "same",
                            "loss": {"kind": "custom", "name": "direction", "weight": 1.0},
                        }
                    ],
                    "tokens": {"divergence": "forward_kl"},
                }
            ],
        },
        objectives={"direction": direction},
    )
    return xkd.train(plan, given.output)


if __name__ == "__main__":
    main()
