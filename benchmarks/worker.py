"""Process that measures one contender: a line of JSON in, a line of JSON out. `measure.Remote` starts it.

The first line is the request: {"operation", "case", "contender", "root", "device", "threads", "quick"}, or {"machine",
"dtype", "device", "threads", "quick"} for the roofline. The answer holds the reason if there is nothing to measure.
Each further line names a method of `Session` or `Machine`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Answer until the input ends. Output of libraries goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    subject: Any = None
    for line in sys.stdin:
        try:
            if subject is None:
                subject, answer = begin(json.loads(line))
            else:
                answer = getattr(subject, json.loads(line)["do"])()
        except Exception as error:
            from benchmarks.session import one_line

            answer = {"failed": one_line(error)}
        answers.write(json.dumps({"answer": answer}) + "\n")
        answers.flush()


def begin(asked: dict[str, Any]) -> tuple[Any, Any]:
    """Return the subject of the measurement and the first answer."""
    torch.set_num_threads(asked["threads"])
    if "machine" in asked:
        from benchmarks.machine import Machine

        return Machine(device=asked["device"], dtype=asked["dtype"], quick=asked["quick"]), {"missing": None}
    import xarch_kd
    from benchmarks.cases import CASES
    from benchmarks.session import Session

    where = Path(xarch_kd.__file__).resolve().parent.parent
    if where != Path(asked["root"]).resolve():
        raise ImportError("the imported package is not that of the requested revision")
    case = next(case for case in CASES[asked["operation"]] if case.name == asked["case"])
    session = Session(case, asked["contender"], device=asked["device"], quick=asked["quick"])
    return session, {"missing": session.prepare()}


if __name__ == "__main__":
    main()
