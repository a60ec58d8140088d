"""The student's model card: its origin, the mapping file verbatim, and the measured figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import ModelCard, ModelCardData

import xarch_kd
from xarch_kd.calibration.projector_report import ProjectorReport, read_reports, warnings_of
from xarch_kd.evaluation.results import read_evaluation, render_markdown
from xarch_kd.files import seal_again, write_text
from xarch_kd.job.model_index import model_index
from xarch_kd.job.run import Run
from xarch_kd.mapping_file.schema import Text
from xarch_kd.models.loading.licence import licence_of
from xarch_kd.models.serving import SERVING_COLUMNS
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.render_selection import difference_text
from xarch_kd.run.folder import RunFolder

HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What a card says of a run that is a control.
CHANGES: Final = {"unchanged": "This is a control: the teacher itself, trained by the recipe without its conversion."}
# Of Jinja: {{ card_data }} is the metadata as YAML, the other names are values of `card`.
TEMPLATE: Final = """---
{{ card_data }}
---

# {{ title }}

A {{ student.model_type }} student distilled from the Transformer `{{ teacher.reference }}` with xarch_kd {{ version }}.
{{ change }}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
student = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

No code comes with this checkpoint: it is a stock `{{ student.model_type }}` model of transformers.

| | teacher | student |
|---|---|---|
| reference | `{{ teacher.reference }}`{% if revision %}, revision `{{ revision }}`{% endif %} | this folder |
| type | {{ teacher.model_type }} | {{ student.model_type }} |
| parameters | {{ "{:,}".format(teacher.parameters) }} | {{ "{:,}".format(student.parameters) }} |
| licence | {{ licence or "not stated by the teacher's checkpoint" }} | the teacher's applies to what was inherited |

## Servers

{{ servers }}

## Measured

{{ figures }}

## Training

{% for stage in stages -%}
- `{{ stage.stage.name }}`: {{ steps[stage.stage.name] }} steps, {{ "at most " if is_padded }}{{
  "{:,}".format(steps[stage.stage.name] * stage.tokens_per_step) }} tokens,
  {{ "{:,}".format(stage.trainable_parameters) }} parameters trained
{% endfor %}
{%- for warning in warnings %}
Warning of {{ warning }}
{% endfor %}
Data: {{ data }}. The figures of every step are in the run's `events.jsonl`.

## Mapping file

```yaml
{{ mapping }}
```
"""


def write_card(plan: Plan, folder: RunFolder) -> None:
    """Write `student/README.md` from the plan, the evaluation of the run and the reports on its projectors."""
    reports = read_reports(folder.projector_reports) if folder.projector_reports.is_file() else ()
    steps = {name: stage.step for name, stage in Run(folder.root).stages.items()}
    path = folder.student / "README.md"
    write_text(path, card(plan, steps, folder.evaluation, reports))
    seal_again(folder.student, path)


def card(plan: Plan, steps: Mapping[str, int], evaluation: Path, reports: Sequence[ProjectorReport] = ()) -> str:
    """Return the text of the model card, with the warnings of `reports` on the projectors.

    `steps` are the optimizer steps that each stage took, by its name.
    """
    teacher = plan.teacher
    replaced = [str(row.index) for row in plan.student.layers if row.replaced]
    licence = licence_of(teacher.reference, plan.mapping.teacher.revision)
    is_on_hub = HUB_ID.fullmatch(teacher.reference) is not None and not Path(teacher.reference).exists()
    data = plan.mapping.data
    results = model_index(read_evaluation(evaluation)) if evaluation.is_file() else []
    made = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            license=licence,
            base_model=teacher.reference if is_on_hub else None,
            tags=["distillation", "xarch_kd"],
            model_name=folder_title(plan) if results else None,
            eval_results=results or None,
        ),
        template_str=TEMPLATE,
        title=folder_title(plan),
        student=plan.student,
        teacher=teacher,
        version=xarch_kd.__version__,
        change=(
            f"The attention of {len(replaced)} of {len(plan.student.layers)} blocks ({', '.join(replaced)}) was "
            f"replaced by new mixers{_chosen_by(plan)}."
            if replaced
            else CHANGES.get(plan.mapping.control, "The student's mixers were not made from the teacher's.")
        ),
        revision=plan.mapping.teacher.revision,
        licence=licence,
        servers=_servers(plan),
        figures=_figures(evaluation),
        stages=plan.stages,
        steps=steps,
        warnings=list(warnings_of(reports)),
        is_padded=data.packing != "wrapped",
        data=", ".join(named_source(source) for source in data.mixture or (data,)),
        mapping=plan.source.rstrip(),
    )
    return f"{made}\n"


def named_source(text: Text) -> str:
    """Return a text source as the mapping file names it."""
    return text.builtin or text.dataset or ", ".join(text.files or ())


def folder_title(plan: Plan) -> str:
    """Return a title: the mapping file's name, or the two types."""
    return plan.path.stem if plan.path else f"{plan.teacher.model_type} to {plan.student.model_type}"


def _chosen_by(plan: Plan) -> str:
    """Return how the replaced blocks were chosen, and how much better than an even choice, empty for a list."""
    found = plan.selection
    if found is None:
        return ""
    uniform = next(one for one in found.compared if one.name == "uniform")
    return (
        f", chosen by {found.strategy} ({found.metric}); before training, the KL divergence from the teacher on other "
        f"text was {next(one.kl for one in found.compared if one.difference is None):.3f}, and that of evenly spaced "
        f"blocks {difference_text(uniform)} nats per token more (selection.json of the run)"
    )


def _servers(plan: Plan) -> str:
    if not plan.serving:
        return f"It is not known here which servers run a {plan.student.model_type}."
    lines = [SERVING_COLUMNS, ["---"] * len(SERVING_COLUMNS), *plan.serving]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(evaluation: Path) -> str:
    return render_markdown(read_evaluation(evaluation)) if evaluation.is_file() else "Not measured."
