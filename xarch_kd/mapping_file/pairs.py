"""The pairs of one `align` entry: which layers, which projector, and whether both models can serve it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from xarch_kd.errors import UsageError, XarchError
from xarch_kd.layer_mapping import Pairs, build_layer_map, explicit
from xarch_kd.mapping_file.marks import Place, Problem
from xarch_kd.mapping_file.mixing_sizes import mixing_size
from xarch_kd.mapping_file.plan import PairPlan
from xarch_kd.mapping_file.schema import Align, Stage
from xarch_kd.mapping_file.sides import Side
from xarch_kd.projectors.heads import head_map

WHOLE_TAPS = ("embedding", "head_input")


@dataclass
class Findings:
    """What is wrong and what is worth a notice, gathered over the whole file."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Note a problem that many pairs may share, once."""
        if problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Models:
    """Both models, and the blocks of the student whose mixer was replaced."""

    teacher: Side
    student: Side
    replaced: tuple[int, ...]


def told(error: XarchError) -> str:
    """Return an error on one line: what, found, allowed, fix."""
    details = (("found", error.found), ("allowed", error.allowed), ("fix", error.fix))
    return "; ".join([error.message.rstrip("."), *(f"{name}: {value}" for name, value in details if value is not None)])


def align_pairs(align: Align, stage: Stage, models: Models, place: Place, findings: Findings) -> list[PairPlan]:
    """Return the pairs of one `align` entry; what does not fit goes to `findings`."""
    if align.tap in WHOLE_TAPS:
        if stage.inputs == "teacher":
            message = f"inputs: teacher runs single blocks, which have no {align.tap}. Use a tap of blocks."
            findings.problems.append(Problem((*place, "tap"), message))
        if align.layers is not None:
            message = f"the tap {align.tap} is one for the whole model, so it has no layers. Leave this key out."
            findings.problems.append(Problem((*place, "layers"), message, on="key"))
        return [_pair(align, align.name, None, None, models, place, findings)]
    for side, name in ((models.teacher, "teacher"), (models.student, "student")):
        if align.tap == "mlp_output" and side.layout.mlp_outputs is None:
            message = f"the {name} is a {side.config.model_type}, whose blocks have no MLP that is known"
            findings.problems.append(Problem((*place, "tap"), message))
    layers = _layer_pairs(align, models, place, findings)
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
    return [replace(pair, weight=pair.weight * share) for pair, (_, _, share) in zip(pairs, layers, strict=True)]


def _layer_pairs(align: Align, models: Models, place: Place, findings: Findings) -> Pairs:
    depths = (models.student.depth, models.teacher.depth)
    if align.layers is None:
        message = (
            "required key is missing. It must be same | replaced | uniform, or a list of {student, teacher} entries."
        )
        findings.problems.append(Problem((*place, "layers"), message))
        return ()
    if not isinstance(align.layers, str):
        outside = [
            Problem(
                (*place, "layers", index, name),
                f"layer {layer} is out of range: the {name} has {depth} blocks, so 0 to {depth - 1} are allowed",
            )
            for index, pair in enumerate(align.layers)
            for name, layer, depth in (("student", pair.student, depths[0]), ("teacher", pair.teacher, depths[1]))
            if layer >= depth
        ]
        findings.problems += outside
        if outside:
            return ()
        if not align.layers:
            findings.problems.append(Problem((*place, "layers"), "the list is empty, so nothing would be matched"))
            return ()
    try:
        if isinstance(align.layers, str):
            kinds = models.student.layout.mixer_kinds, models.teacher.layout.mixer_kinds
            return build_layer_map(
                align.layers,
                *depths,
                replaced_layers=models.replaced,
                student_kinds=kinds[0],
                teacher_kinds=kinds[1],
            ).pairs()
        return explicit([(pair.student, pair.teacher) for pair in align.layers], *depths).pairs()
    except UsageError as error:
        findings.problems.append(Problem((*place, "layers"), told(error)))
        return ()


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
    projector = align.projector
    if projector == "auto":
        projector = "none" if student == teacher else "linear"
    if projector == "none" and student != teacher:
        message = (
            f"the student is {student} wide and the teacher {teacher}, so a projector is needed. Use auto or linear."
        )
        findings.add(Problem((*place, "projector"), message))
    return PairPlan(
        name=name,
        align=align.name,
        tap=align.tap,
        student_layer=student_layer,
        teacher_layer=teacher_layer,
        student_width=student,
        teacher_width=teacher,
        projector=projector,
        projector_parameters=student * teacher if projector == "linear" else 0,
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
