"""A converted mixer beside the attention that it replaces: both as time × time matrices of what they do to tokens.

python examples/attention_beside_ssm.py ./teacher "The quick brown fox jumps over the lazy dog" --layer 1
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import xarch_kd as xkd

SHADES = " .:-=+*#%@"


def drawn(matrix: torch.Tensor) -> str:
    """Return the sizes of a matrix [time, time] as characters, each row by its own largest entry."""
    shares = matrix.abs() / matrix.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return "\n".join("".join(SHADES[int(9 * share)] for share in row) for row in shares.tolist())


def main(arguments: list[str] | None = None) -> float:
    """Print one head of both and return their distance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("text")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--head", type=int, default=0)
    given = parser.parse_args(arguments)
    teacher = AutoModelForCausalLM.from_pretrained(given.teacher).eval()
    student = xkd.convert(teacher, mixer="mamba2", replace=[given.layer]).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(given.teacher)(given.text)["input_ids"]])
    with torch.no_grad():
        ours, theirs = (
            xkd.trace(model, ids, taps=["mixing"], layers=[given.layer])["mixing"][given.layer]
            for model in (student, teacher)
        )
    # Factors until here; the matrices themselves are made for drawing alone.
    for name, mixing in (("attention", theirs), ("Mamba-2 mixer", ours)):
        print(f"{name}, layer {given.layer}, head {given.head}:\n{drawn(mixing.dense()[0, given.head])}\n")
    distance = float(xkd.ops.mixing_distance(ours, theirs, distance="cosine").total)
    print(f"1 - cosine, mean over rows and heads: {distance:.3f}")
    return distance


if __name__ == "__main__":
    main()
