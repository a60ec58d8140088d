"""Controls of a recipe: the unconverted teacher as student, and teacher features of other text."""

from __future__ import annotations

from collections.abc import Iterator

from xarch_kd.mapping_file.schema import MappingFile
from xarch_kd.mapping_file.source_map import Problem


def applicable(mapping: MappingFile) -> MappingFile:
    """Return the mapping with the stages that its control leaves.

    With `control: unchanged` stages with `inputs: teacher` are left out: they match new mixers to the attention that
    they replace, and nothing is replaced. Where that leaves none, all stay, and `control_problems` has the problem.
    """
    if mapping.control != "unchanged":
        return mapping
    stages = tuple(stage for stage in mapping.stages if stage.inputs == "student")
    return mapping.model_copy(update={"stages": stages}) if stages else mapping


def control_problems(mapping: MappingFile) -> Iterator[Problem]:
    """Yield what keeps a mapping from being run under its control."""
    if mapping.control == "unchanged":
        if mapping.student.convert is None:
            yield Problem(("control",), "unchanged is the teacher before its conversion. Use it with student.convert.")
        if all(stage.inputs == "teacher" for stage in mapping.stages):
            message = "unchanged leaves out stages with inputs: teacher, which all are. Use control: shuffled."
            yield Problem(("control",), message)
    if mapping.control == "shuffled":
        data = mapping.data
        if data.packing == "none" or data.documents == "isolated":
            message = (
                "shuffled exchanges the features of whole rows, which must be equally long. Use packing: wrapped and "
                "documents: joined."
            )
            yield Problem(("control",), message)
        for index, stage in enumerate(mapping.stages):
            if (stage.batch_size or data.batch_size) < 2:
                message = "control: shuffled needs two rows in each micro-batch. Set batch_size: 2 or more."
                yield Problem(("stages", index), message)


def control_warnings(mapping: MappingFile, planned: MappingFile) -> Iterator[str]:
    """Yield a line about what a control does to a run of `mapping`, of which the stages of `planned` are left."""
    if mapping.control == "unchanged":
        kept = [stage.name for stage in planned.stages]
        left_out = [stage.name for stage in mapping.stages if stage.name not in kept]
        without = f"; left out, as they match new mixers to attention: {', '.join(left_out)}" if left_out else ""
        yield (
            "control: unchanged: the student is the teacher itself, no mixer is replaced. It trains in the stages "
            f"{', '.join(kept)}{without}"
        )
    if mapping.control == "shuffled":
        yield (
            "control: shuffled: each row is compared with the teacher's features of another row of its micro-batch, in "
            "all stages; blocks fed by the teacher still get those of their own row"
        )
