"""The student's model card: where it comes from, the mapping file verbatim, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xarch_kd
from xarch_kd.calibration.projector_report import ProjectorReport, read_reports, warnings_of
from xarch_kd.evaluation.results import read_evaluation
from xarch_kd.files import write_text
from xarch_kd.models.loading.licence import licence_of
from xarch_kd.planning.plan import Plan
from xarch_kd.run.folder import RunFolder

TEMPLATE = """---
{front}---

# {title}

A {student_type} student distilled from the Transformer `{teacher}` with xarch_kd {version}.
{change}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
student = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

No code comes with this checkpoint: it is a stock `{student_type}` model of transformers.

| | teacher | student |
|---|---|---|
| reference | `{teacher}`{revision} | this folder |
| type | {teacher_type} | {student_type} |
| parameters | {teacher_parameters:,} | {student_parameters:,} |
| licence | {licence} | the teacher's applies to what was inherited |

## Measured

{figures}

## Training

{stages}
{projectors}
Data: {data}. The figures of every step are in the run's `events.jsonl`.

## Mapping file

```yaml
{mapping}
```
"""


def write_card(plan: Plan, folder: RunFolder) -> None:
    """Write `student/README.md` from the plan and what the run measured, of it and of its projectors."""
    reports = read_reports(folder.projector_reports) if folder.projector_reports.is_file() else ()
    write_text(folder.student / "README.md", card(plan, folder.evaluation, reports))


def card(plan: Plan, evaluation: Path, reports: Sequence[ProjectorReport] = ()) -> str:
    """Return the text of the model card; of the projectors it holds what they are warned of."""
    teacher, student = plan.teacher, plan.student
    replaced = [str(row.index) for row in student.layers if row.replaced]
    licence = licence_of(teacher.reference, plan.mapping.teacher.revision)
    front = ["library_name: transformers", "tags: [distillation, xarch_kd]"]
    if licence:
        front.append(f"license: {licence}")
    return TEMPLATE.format(
        front="".join(f"{line}\n" for line in front),
        title=folder_title(plan),
        student_type=student.model_type,
        teacher=teacher.reference,
        teacher_type=teacher.model_type,
        version=xarch_kd.__version__,
        change=(
            f"The attention of {len(replaced)} of {len(student.layers)} blocks ({', '.join(replaced)}) was replaced by "
            "state-space mixers."
            if replaced
            else "The student's mixers were not made from the teacher's."
        ),
        revision=f", revision `{plan.mapping.teacher.revision}`" if plan.mapping.teacher.revision else "",
        teacher_parameters=teacher.parameters,
        student_parameters=student.parameters,
        licence=licence or "not stated by the teacher's checkpoint",
        figures=_figures(evaluation),
        stages="\n".join(
            f"- `{stage.stage.name}`: {stage.stage.steps} steps, {stage.tokens:,} tokens, "
            f"{stage.trainable_parameters:,} parameters trained"
            for stage in plan.stages
        ),
        projectors="".join(f"\nWarning of {warning}\n" for warning in warnings_of(reports)),
        data=plan.mapping.data.builtin or plan.mapping.data.dataset or ", ".join(plan.mapping.data.files or ()),
        mapping=plan.source.rstrip(),
    )


def folder_title(plan: Plan) -> str:
    """Return a title: the mapping file's name, or the two types."""
    return plan.path.stem if plan.path else f"{plan.teacher.model_type} to {plan.student.model_type}"


def _figures(evaluation: Path) -> str:
    if not evaluation.is_file():
        return "Not measured."
    lines = [
        "| text | tokens | teacher NLL | student NLL | difference (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    measured = read_evaluation(evaluation)
    for result in measured.likelihood:
        interval = "" if result.low is None or result.high is None else f" ({result.low:+.4f} to {result.high:+.4f})"
        lines.append(
            f"| {result.text} ({result.description}) | {result.tokens:,} | {result.teacher_nll:.4f} "
            f"| {result.student_nll:.4f} | {result.difference:+.4f}{interval} |"
        )
    return "\n".join([*lines, "", "Nats per token; the interval is a paired bootstrap over rows."])
