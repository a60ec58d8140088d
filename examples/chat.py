"""Distil a chat model on conversations: only the assistant's turns are learned, in the tokenizer's own template.

    python examples/chat.py ./teacher conversations.jsonl --output runs/chat

Each line of the file is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.
"""

from __future__ import annotations

import argparse

import xarch_kd as xkd


def main(arguments: list[str] | None = None) -> xkd.Run:
    """Train a hybrid of the chat model on the conversations and return the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("conversations")
    parser.add_argument("--output", default="runs/chat")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    given = parser.parse_args(arguments)
    replaced = {"name": "output", "tap": "mixer_output", "layers": "replaced", "loss": {"kind": "relative_mse"}}
    mapping = {
        "version": 1,
        "teacher": {"model": given.teacher},
        "student": {"convert": {"mixer": "mamba2", "keep_attention": "every 2"}},
        "data": {
            "files": [given.conversations],
            "shape": "messages",
            "train_on": "assistant",
            "packing": "best_fit",  # no conversation is cut that fits into a row
            "sequence_length": given.length,
            "batch_size": 2,
        },
        "stages": [
            {
                "name": "mixers",
                "steps": given.steps,
                "train": ["mixers"],
                "inputs": "teacher",
                "align": [replaced],
                "optimizer": {"lr": 1e-2},
            },
            {
                "name": "logits",
                "steps": max(1, given.steps // 5),
                "train": ["mixers"],
                "tokens": {"divergence": "forward_kl"},
                "optimizer": {"lr": 1e-3},
            },
        ],
    }
    return xkd.train(xkd.plan(mapping), given.output)


if __name__ == "__main__":
    main()
