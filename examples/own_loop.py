"""A training loop of one's own around `xkd.Aligner`: objectives and projectors from a mapping file, the rest in here.

python examples/own_loop.py ./teacher text.txt --steps 100
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import xarch_kd as xkd


def main(arguments: list[str] | None = None) -> list[float]:
    """Train a hybrid on one file of text and return the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    given = parser.parse_args(arguments)
    mapping = {
        "version": 1,
        "teacher": {"model": given.teacher},
        "student": {"convert": {"mixer": "mamba2", "keep_attention": "every 2"}},
        "data": {"files": [given.text], "sequence_length": given.length, "batch_size": 4},
        "stages": [
            {
                "name": "hybrid",
                "steps": given.steps,
                "train": ["mixers"],
                "align": [{"name": "stream", "tap": "hidden", "layers": "same", "loss": {"kind": "relative_mse"}}],
                "tokens": {"divergence": "forward_kl", "weight": 0.5},
            }
        ],
    }
    teacher = AutoModelForCausalLM.from_pretrained(given.teacher)
    student = xkd.convert(teacher, mixer="mamba2", keep_attention="every 2")
    aligner = xkd.Aligner(xkd.plan(mapping), teacher=teacher, student=student)
    trained = [parameter for parameter in aligner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    with open(given.text, encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(given.teacher)(file.read())["input_ids"]
    rows = torch.tensor(ids[: len(ids) // given.length * given.length]).view(-1, given.length)
    losses = []
    for step in range(given.steps):
        batch = rows[torch.randint(len(rows), (4,))]
        output = aligner(input_ids=batch, step=step)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
        if step % 10 == 0:
            parts = ", ".join(f"{name} {float(value):.4f}" for name, value in output.parts.items())
            print(f"step {step}: {parts}")
    student.save_pretrained("student")
    return losses


if __name__ == "__main__":
    main()
