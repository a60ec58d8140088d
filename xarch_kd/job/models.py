"""Models of a run: the frozen teacher, the student from its source, and their shared vocabulary."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xarch_kd.models.conversion.convert import convert
from xarch_kd.models.embeddings import Transfer, transfer_embeddings
from xarch_kd.models.loading.load import DTYPES, cast_parameters, fresh_model, load_model, load_tokenizer
from xarch_kd.models.loading.progress import weights_progress
from xarch_kd.models.loading.quantized import Quantization
from xarch_kd.models.loading.tokens import check_rows, check_same_ids, shared_vocabulary
from xarch_kd.planning.plan import Plan
from xarch_kd.run.processes import Processes
from xarch_kd.run.report import Reporter


@dataclass(frozen=True, kw_only=True)
class RunModels:
    """Models of a run. The student trains in float32, whatever dtype it is saved in.

    Texts are cut by the teacher's `tokenizer`; the student is saved with its own, which is the same one unless the
    student existed before.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase


def device_of(plan: Plan) -> torch.device:
    """Return the device that the plan's `device` means here."""
    asked = plan.mapping.device
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(asked)


def load_run_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """Return the teacher's tokenizer, which also cuts the training text.

    Raises `ModelError` for one that cannot be read, or with more tokens than the teacher's embedding has rows.
    """
    teacher = plan.mapping.teacher
    tokenizer = load_tokenizer(teacher.tokenizer or teacher.model, teacher.revision)
    check_rows(tokenizer, plan.teacher.vocabulary, side="teacher")
    return tokenizer


def load_student_tokenizer(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the student is saved with: that of an existing student, else the teacher's `tokenizer`.

    Raises `ModelError` where the student would read the teacher's token ids as other tokens.
    """
    student, rows = plan.mapping.student, plan.student.vocabulary
    compares_tokens = any(stage.tokens is not None for stage in plan.mapping.stages)
    own = tokenizer
    if student.model is not None:
        own = load_tokenizer(student.tokenizer or student.model, student.revision)
        check_same_ids(tokenizer, own, rows)
    elif student.config is not None:
        check_rows(tokenizer, rows, side="student")
    if compares_tokens and student.convert is None:
        shared_vocabulary(tokenizer, own, plan.teacher.vocabulary, rows)
    return own


def config_fingerprint(config: PreTrainedConfig) -> str:
    """Return the SHA-256 of a config's values, without the folder that it was read from."""
    values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def load_weights(
    reference: str,
    reporter: Reporter,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
    allow_quantized: bool = False,
) -> PreTrainedModel:
    """Return the model of a reference as `load_model` does, showing the progress of reading it."""
    with reporter.work(f"loading {reference}", None, "tensors") as work, weights_progress(work.at):
        return load_model(
            reference,
            revision=revision,
            dtype=dtype,
            device=device,
            quantization=quantization,
            allow_quantized=allow_quantized,
        )


def load_teacher(plan: Plan, reporter: Reporter) -> PreTrainedModel:
    """Return the teacher on the CPU: in float32 if it is converted, else in its own dtype. Raises ModelError."""
    reference = plan.mapping.teacher
    # A conversion is exact only from full-precision weights; the teacher is rounded to its own dtype afterwards.
    dtype = torch.float32 if plan.conversion is not None else DTYPES[reference.dtype]
    reporter.line(f"loading the teacher {reference.model}")
    return load_weights(
        reference.model,
        reporter,
        revision=reference.revision,
        dtype=dtype,
        quantization=reference.quantization,
        allow_quantized=plan.conversion is None,
    )


def load_models(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    processes: Processes | None = None,
    *,
    teacher: PreTrainedModel | None = None,
) -> RunModels:
    """Return teacher and student on this process's device of the plan. Raises ModelError and ConversionError.

    `teacher` is what `load_teacher` returned, if it was called before.
    """
    teacher_reference, student_source = plan.mapping.teacher, plan.mapping.student
    conversion = plan.conversion
    student_tokenizer = load_student_tokenizer(plan, tokenizer)
    if teacher is None:
        teacher = load_teacher(plan, reporter)
    if plan.mapping.control == "unchanged":
        student = copy.deepcopy(teacher)
        cast_parameters(teacher, DTYPES[teacher_reference.dtype])
    elif conversion is not None:
        replaced = sum(row.replaced for row in plan.student.layers)
        reporter.line(f"converting it: {replaced} of {len(plan.student.layers)} mixers replaced")
        with reporter.work("converting", 3, "steps") as work:
            layers: Any = conversion.layers
            student = convert(
                teacher,
                mixer=conversion.mixer,
                **layers,
                target=conversion.target,
                mamba2=conversion.mixer_sizes,
                window=conversion.window,
                sinks=conversion.sinks,
                init=conversion.init,
                seed=plan.mapping.seed,
                progress=work.at,
            )
        cast_parameters(teacher, DTYPES[teacher_reference.dtype])
    elif student_source.model is not None:
        reporter.line(f"loading the student {student_source.model}")
        student = load_weights(student_source.model, reporter, revision=student_source.revision)
    else:
        config = CONFIG_MAPPING[plan.student_config["model_type"]].from_dict(plan.student_config)
        student = fresh_model(config, seed=plan.mapping.seed)
        if student_source.embeddings == "teacher":
            rows = shared_vocabulary(tokenizer, tokenizer, plan.teacher.vocabulary, plan.student.vocabulary)
            for transfer in transfer_embeddings(teacher, student, rows=rows):
                reporter.line(_transfer_line(transfer))
    device = (processes or Processes()).device(device_of(plan))
    return RunModels(
        teacher=teacher.to(device).eval().requires_grad_(False),  # type: ignore[arg-type]  # stubs expect a bound method
        student=student.to(device),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        student_tokenizer=student_tokenizer,
    )


def _transfer_line(transfer: Transfer) -> str:
    narrower = transfer.student_dim < transfer.teacher_dim
    share = f", which keeps {transfer.kept:.1%} of their squared length" if narrower else ""
    return (
        f"the student's {transfer.part} starts as the teacher's: {transfer.rows} rows, {transfer.teacher_dim} to "
        f"{transfer.student_dim} dimensions{share}"
    )
