"""A process that measures one contender: a line of JSON in, a line of JSON out. `measure.Remote` starts it.

The first line says what: {"operation", "case", "contender", "device", "threads", "quick"}, or {"machine", "dtype",
"device", "threads", "quick"} for the roofline. The answer says whether there is something to measure. Then each line
names a method of `Session` or `Machine`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Answer until the input ends. What libraries print goes to the standard error."""
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
            from benchmarks.session import said

            answer = {"failed": said(error)}
        answers.write(json.dumps({"answer": answer}) + "\n")
        answers.flush()


def begin(asked: dict[str, Any]) -> tuple[Any, Any]:
    """Return what is measured, and what is said about it first."""
    torch.set_num_threads(asked["threads"])
    if "machine" in asked:
        from benchmarks.machine import Machine

        return Machine(device=asked["device"], dtype=asked["dtype"], quick=asked["quick"]), {"missing": None}
    import xarch_kd
    from benchmarks.cases import CASES
    from benchmarks.session import Session

    where = Path(xarch_kd.__file__).resolve().parent.parent
    if where != Path(asked["root"]).resolve():
        raise ImportError("the package that was imported is not the one of the revision asked for")
    case = next(case for case in CASES[asked["operation"]] if case.name == asked["case"])
    session = Session(case, asked["contender"], device=asked["device"], quick=asked["quick"])
    return session, {"missing": session.prepare()}


if __name__ == "__main__":
    main()
