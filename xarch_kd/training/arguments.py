"""Arguments of `transformers.Trainer` for a stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from xarch_kd.mapping_file.training import Optimizer
from xarch_kd.planning.plan import StagePlan
from xarch_kd.run.processes import Processes


def training_arguments(
    plan: StagePlan, processes: Processes, *, folder: Path, seed: int, cpu: bool, tracking: tuple[str, ...]
) -> TrainingArguments:
    """Return the arguments of a stage that writes into `folder`."""
    settings = plan.stage.optimizer
    schedule, options = schedule_of(settings, plan.steps)
    return TrainingArguments(
        output_dir=str(folder),
        run_name=f"{folder.parent.parent.name}-{plan.stage.name}",
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.stage.gradient_accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=round(settings.warmup * plan.steps),
        # 0 turns clipping off.
        max_grad_norm=0.0 if settings.max_grad_norm == "off" else settings.max_grad_norm,
        # The Trainer treats some optimizers by name; `StageTrainer.create_optimizer` builds it.
        optim=settings.optim,
        logging_steps=1,
        save_steps=plan.stage.checkpoint_every or max(1, math.ceil(plan.steps / 4)),
        seed=seed,
        use_cpu=cpu,
        # A layer map that is redrawn, or an objective whose weight is 0, leaves parameters without a gradient.
        ddp_find_unused_parameters=True,
        # accelerate takes a backend for a process group, which one process does not have.
        log_level_replica="error",
        ddp_backend="gloo" if cpu and processes.world_size > 1 else None,
        report_to=list(tracking) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # The source's own state determines where a resumed stage continues.
        ignore_data_skip=True,
        # `StageTrainer` refuses losses that are not finite; this filter would read each loss from the device.
        logging_nan_inf_filter=False,
    )


def schedule_of(settings: Optimizer, steps: int) -> tuple[str, dict[str, Any]]:
    """Return the name of a schedule in transformers, and its options; rates are relative to the peak."""
    lowest = settings.min_lr / settings.lr
    if settings.schedule == "wsd":
        return "warmup_stable_decay", {"num_decay_steps": round(settings.decay_share * steps), "min_lr_ratio": lowest}
    if settings.min_lr == 0:
        return settings.schedule, {}
    if settings.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": lowest}
    return "polynomial", {"lr_end": settings.min_lr, "power": 1.0}
