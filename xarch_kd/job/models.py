"""The models of a run: the frozen teacher, the student from its source, and the vocabulary they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.embeddings import Transfer, transfer_embeddings
from xarch_kd.models.loading.load import fresh_model, load_model, load_tokenizer
from xarch_kd.models.loading.tokens import shared_vocabulary
from xarch_kd.planning.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class RunModels:
    """Models of a run. The student trains in float32, whatever dtype it is saved in."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def device_of(plan: Plan) -> torch.device:
    """Return the device that the plan's `device` means here."""
    asked = plan.mapping.device
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(asked)


def load_run_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """Return the teacher's tokenizer, which also cuts the training text."""
    teacher = plan.mapping.teacher
    return load_tokenizer(teacher.tokenizer or teacher.model, teacher.revision)


def load_models(plan: Plan, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> RunModels:
    """Return teacher and student on the plan's device. Raises ModelError and ConversionError."""
    teacher_reference, student_source = plan.mapping.teacher, plan.mapping.student
    conversion = student_source.convert
    # A conversion is exact only from full-precision weights; the teacher is rounded to its own dtype afterwards.
    dtype = torch.float32 if conversion is not None else DTYPES[teacher_reference.dtype]
    say(f"loading the teacher {teacher_reference.model}")
    teacher = load_model(teacher_reference.model, revision=teacher_reference.revision, dtype=dtype)
    if conversion is not None:
        replaced = sum(row.replaced for row in plan.student.layers)
        say(f"converting it: {replaced} of {len(plan.student.layers)} mixers replaced")
        student = convert(
            teacher,
            mixer=conversion.mixer,
            keep_attention=conversion.keep_attention,
            replace=conversion.replace,
            target=conversion.target,
            init=conversion.init,
            seed=plan.mapping.seed,
        )
        cast_parameters(teacher, DTYPES[teacher_reference.dtype])
    elif student_source.model is not None:
        say(f"loading the student {student_source.model}")
        student = load_model(student_source.model, revision=student_source.revision)
        own = load_tokenizer(student_source.tokenizer or student_source.model, student_source.revision)
        shared_vocabulary(tokenizer, own, plan.teacher.vocabulary, plan.student.vocabulary)
    else:
        config = CONFIG_MAPPING[plan.student_config["model_type"]].from_dict(plan.student_config)
        student = fresh_model(config, seed=plan.mapping.seed)
        rows = shared_vocabulary(tokenizer, tokenizer, plan.teacher.vocabulary, plan.student.vocabulary)
        if student_source.embeddings == "teacher":
            for transfer in transfer_embeddings(teacher, student, rows=rows):
                say(_told(transfer))
    device = device_of(plan)
    return RunModels(
        teacher=teacher.to(device).eval().requires_grad_(False),  # type: ignore[arg-type]  # stubs want a bound method
        student=student.to(device),  # type: ignore[arg-type]
        tokenizer=tokenizer,
    )


def _told(transfer: Transfer) -> str:
    narrower = transfer.student_dim < transfer.teacher_dim
    share = f", which keeps {transfer.kept:.1%} of their squared length" if narrower else ""
    return (
        f"the student's {transfer.part} starts as the teacher's: {transfer.rows} rows, {transfer.teacher_dim} to "
        f"{transfer.student_dim} dimensions{share}"
    )


@torch.no_grad()
def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's parameters to `dtype` in place, as loading in that dtype would.

    Buffers stay as they are: `model.to(dtype)` would also round the rotary frequencies, and with them the logits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
