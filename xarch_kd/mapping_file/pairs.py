"""The pairs of one `align` entry: which layers, which projector, and whether both models can serve it."""

from __future__ import annotations

from dataclasses import replace

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import LayerMap
from xarch_kd.mapping_file.findings import Findings, Models, told
from xarch_kd.mapping_file.layer_maps import layer_map
from xarch_kd.mapping_file.marks import Place, Problem
from xarch_kd.mapping_file.mixing_sizes import mixing_size
from xarch_kd.mapping_file.objectives import Align
from xarch_kd.mapping_file.plan import PairPlan
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.projectors import parameter_count, resolve_kind
from xarch_kd.projectors.heads import head_map

WHOLE_TAPS = ("embedding", "head_input")
Entry = tuple[list[PairPlan], LayerMap | None]


def align_pairs(align: Align, stage: Stage, models: Models, place: Place, findings: Findings) -> Entry:
    """Return the pairs of one `align` entry and its layer map; what does not fit goes to `findings`."""
    if align.tap in WHOLE_TAPS:
        if stage.inputs == "teacher":
            message = f"inputs: teacher runs single blocks, which have no {align.tap}. Use a tap of blocks."
            findings.problems.append(Problem((*place, "tap"), message))
        if align.layers is not None:
            message = f"the tap {align.tap} is one for the whole model, so it has no layers. Leave this key out."
            findings.problems.append(Problem((*place, "layers"), message, on="key"))
        return [_pair(align, align.name, None, None, models, place, findings)], None
    for side, name in ((models.teacher, "teacher"), (models.student, "student")):
        if align.tap == "mlp_output" and side.layout.mlp_outputs is None:
            message = f"the {name} is a {side.config.model_type}, whose blocks have no MLP that is known"
            findings.problems.append(Problem((*place, "tap"), message))
    found = layer_map(align, models, place, findings)
    layers = () if found is None else found.pairs()
    students = [student for student, _, _ in layers]
    pairs = [
        _pair(
            align,
            f"{align.name}.{student}" + (f"-{teacher}" if students.count(student) > 1 else ""),
            student,
            teacher,
            models,
            place,
            findings,
        )
        for student, teacher, _ in layers
    ]
    weighted = [replace(pair, weight=pair.weight * share) for pair, (_, _, share) in zip(pairs, layers, strict=True)]
    return weighted, found


def _pair(
    align: Align,
    name: str,
    student_layer: int | None,
    teacher_layer: int | None,
    models: Models,
    place: Place,
    findings: Findings,
) -> PairPlan:
    student, teacher = models.student.layout.width, models.teacher.layout.width
    if align.tap == "mixing":
        return _mixing_pair(align, name, student_layer, teacher_layer, models, place, findings)
    projector, parameters = align.projector_kind, 0
    if projector == "none" and student != teacher:
        message = (
            f"the student is {student} wide and the teacher {teacher}, so a projector is needed. Use auto or linear."
        )
        findings.add(Problem((*place, "projector"), message))
    else:
        try:
            projector = resolve_kind(projector, student, teacher)
            parameters = parameter_count(projector, student, teacher, **align.projector_options)
        except UsageError as error:
            findings.add(Problem((*place, "projector"), told(error)))
    return PairPlan(
        name=name,
        align=align.name,
        tap=align.tap,
        student_layer=student_layer,
        teacher_layer=teacher_layer,
        student_width=student,
        teacher_width=teacher,
        projector=projector,
        projector_parameters=parameters,
        loss=align.loss.kind,
        weight=align.loss.weight,
    )


def _mixing_pair(
    align: Align,
    name: str,
    student_layer: int | None,
    teacher_layer: int | None,
    models: Models,
    place: Place,
    findings: Findings,
) -> PairPlan:
    assert align.loss.kind == "mixing"
    assert student_layer is not None
    assert teacher_layer is not None
    kinds = models.student.layout.mixer_kinds[student_layer], models.teacher.layout.mixer_kinds[teacher_layer]
    if align.loss.distance in ("kl", "cross_entropy") and kinds != ("attention", "attention"):
        message = (
            f"{align.loss.distance} compares rows that are distributions, and block {student_layer} of the student "
            f"({kinds[0]}) and block {teacher_layer} of the teacher ({kinds[1]}) are not both attention. "
            "Use cosine, frobenius or relative_frobenius."
        )
        findings.add(Problem((*place, "loss", "distance"), message))
    if align.loss.implementation == "sketch" and align.loss.distance != "frobenius":
        message = "implementation: sketch estimates distance: frobenius alone. Use it, or another implementation."
        findings.add(Problem((*place, "loss", "implementation"), message))
    own, other = mixing_size(models.student.layout, student_layer), mixing_size(models.teacher.layout, teacher_layer)
    if own is not None and other is not None:
        try:
            head_map(align.loss.heads, own.heads, other.heads)
        except UsageError as error:
            given = ("heads",) if "heads" in align.loss.model_fields_set else ()
            findings.add(Problem((*place, "loss", *given), told(error)))
    return PairPlan(
        name=name,
        align=align.name,
        tap=align.tap,
        student_layer=student_layer,
        teacher_layer=teacher_layer,
        student_width=models.student.layout.width,
        teacher_width=models.teacher.layout.width,
        projector="none",
        projector_parameters=0,
        loss=align.loss.kind,
        weight=align.loss.weight,
        student_heads=None if own is None else own.heads,
        teacher_heads=None if other is None else other.heads,
    )
