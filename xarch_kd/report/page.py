"""HTML of a report: one file without scripts, that loads nothing and shows all text of models as text."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

import xarch_kd
from xarch_kd.display import duration
from xarch_kd.errors import printable
from xarch_kd.files import write_text
from xarch_kd.plots.style import as_svg
from xarch_kd.report.content import Item, Lines, Picture, Section, Table, attempt
from xarch_kd.report.read import RunRecord, read_run
from xarch_kd.report.sections import (
    cost_section,
    features_section,
    plan_section,
    provenance_section,
    selection_section,
    training_section,
)
from xarch_kd.report.suites import suite_sections
from xarch_kd.report.verdict import verdict_of

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, by default to `report.html` in its folder, and return its path.

    The report of a finished run is listed in its manifest. Raises UsageError for a folder without a run,
    CheckpointError for a file that is not as it was written or a report that cannot be written.
    """
    record = read_run(run)
    path = record.folder.report if output is None else Path(output)
    write_text(path, run_page(record))
    if output is None and record.is_finished:
        record.folder.update_manifest(path)
    return path


def run_page(run: RunRecord) -> str:
    """Return the page of one run."""
    builders: dict[str, Callable[[RunRecord], Section]] = {
        "plan": plan_section,
        "training": training_section,
        "layers": selection_section,
        "features": features_section,
        "cost": cost_section,
        "provenance": provenance_section,
    }
    built = {
        name: attempt(lambda build=build: build(run), lambda name=name: _damaged(name))
        for name, build in builders.items()
    }
    order = [*(built[name] for name in ("plan", "training", "layers")), *suite_sections(run)]
    order += [built[name] for name in ("features", "cost", "provenance")]
    plan = run.plan
    teacher, student = plan.get("teacher") or {}, plan.get("student") or {}
    return render_page(
        title=run.name,
        subtitle=f"{student.get('model_type', 'student')} distilled from {teacher.get('reference', 'its teacher')}",
        verdict=verdict_of(run),
        facts=_facts(run),
        problems=run.problems,
        sections=[section for section in order if section.items],
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    teacher, student = run.plan.get("teacher") or {}, run.plan.get("student") or {}
    replaced = sum(bool(row.get("replaced")) for row in student.get("layers") or ())
    facts = [
        ("state", "finished" if run.is_finished else "not finished"),
        ("parameters", f"{int(student.get('parameters', 0)):,} (teacher {int(teacher.get('parameters', 0)):,})"),
        ("replaced", f"{replaced} of {len(student.get('layers') or ())} blocks"),
        ("trained on", f"{run.tokens:,} tokens"),
    ]
    return facts if run.seconds is None else [*facts, ("training time", duration(run.seconds))]


def _damaged(name: str) -> Section:
    return Section(name=name, title=name.capitalize(), items=[Lines(lines=["plan.json has no data for this section."])])


def render_page(
    *,
    title: str,
    subtitle: str,
    verdict: Any,
    facts: Sequence[tuple[str, str]],
    problems: Sequence[str],
    sections: Sequence[Section],
) -> str:
    """Return a page of sections under a verdict."""
    names: dict[int, str] = {}

    def svg(picture: Picture) -> Markup:
        name = names.setdefault(id(picture), f"f{len(names)}")
        return Markup(as_svg(picture.figure, name=name, alternative=picture.alternative))

    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            verdict=verdict,
            facts=facts,
            problems=problems,
            sections=sections,
            groups=groups,
            svg=svg,
            version=xarch_kd.__version__,
        )
    )


def groups(items: Sequence[Item]) -> list[tuple[list[Picture], list[Item]]]:
    """Return neighboring pictures, which share rows of the page, each with the tables and lines after them.

    Texts and folded parts are groups of their own: they take the whole width.
    """
    found: list[tuple[list[Picture], list[Item]]] = []
    for item in items:
        if isinstance(item, Picture):
            if not found or found[-1][1]:
                found.append(([], []))
            found[-1][0].append(item)
        elif isinstance(item, Table | Lines) and found:
            found[-1][1].append(item)
        else:
            found.append(([], [item]))
    return found


@cache
def environment() -> Environment:
    """Return the templates. All text is escaped, and control characters are shown as such."""
    from jinja2 import BaseLoader, Environment, TemplateNotFound

    class Package(BaseLoader):
        """Templates beside this module."""

        def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, None]:
            source = files("xarch_kd.report").joinpath(template)
            if not source.is_file():
                raise TemplateNotFound(template)
            return source.read_text(encoding="utf-8"), None, None

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value)), quote=True))

    return Environment(loader=Package(), autoescape=True, finalize=shown, trim_blocks=True, lstrip_blocks=True)
