"""Optimizers of a stage: the class behind a name of transformers, and what keeps one from being used."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import torch

from xarch_kd.errors import suggest
from xarch_kd.mapping_file.schema import Stage
from xarch_kd.mapping_file.source_map import Problem, YamlPath
from xarch_kd.mapping_file.training import Optimizer

EPSILON: Final = 1e-8
# Module -> what pip installs, and the optimizers that need it. bitsandbytes has all that are not listed.
PACKAGES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "torchao": ("torchao", ("adamw_torch_4bit", "adamw_torch_8bit")),
    "schedulefree": ("schedulefree", ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")),
    "optimi": ("torch-optimi", ("stable_adamw",)),
    "grokadamw": ("grokadamw", ("grokadamw",)),
    "torchdistx": ("git+https://github.com/pytorch/torchdistx", ("adamw_anyprecision",)),
    "torch_xla": ("torch_xla", ("adamw_torch_xla",)),
    "torch_npu": ("torch_npu", ("adamw_torch_npu_fused",)),
    "bitsandbytes": (
        "bitsandbytes",
        (
            *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
            *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
            *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
            *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
        ),
    ),
}
# Name -> why a stage cannot use it.
LOW_RANK: Final = (
    "groups the parameters itself, by modules that it projects to a low rank, so that the stage's rates and weight "
    "decay would not hold"
)
DURING_BACKWARD: Final = (
    "changes weights during the backward pass, so that a gradient that is not finite could not be refused before"
)
UNSUPPORTED: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"),
        LOW_RANK,
    ),
    **dict.fromkeys(
        (
            *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
            *("apollo_adamw_layerwise", "lomo", "adalomo"),
        ),
        DURING_BACKWARD,
    ),
}
# Arguments that are keys of `optimizer` or set by the parameter groups.
OWN_KEYS: Final = ("lr", "weight_decay", "betas")


def optimizer_class(settings: Optimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class of an optimizer and its keyword arguments.

    Raises ImportError or ValueError, as transformers does, if its package is missing.
    """
    if settings.optim == "adamw_torch":
        options = {"lr": settings.lr, "betas": settings.betas, "eps": EPSILON}
        return torch.optim.AdamW, {**options, **settings.args}
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    # The fields of TrainingArguments that are read; a real one would also set up devices.
    arguments: Any = SimpleNamespace(
        optim=OptimizerNames(settings.optim),
        optim_args=None,
        learning_rate=settings.lr,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=EPSILON,
        weight_decay=settings.weight_decay,
        warmup_steps=0,
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind, {**options, **settings.args}


def optimizer_problems(stage: Stage, place: YamlPath) -> Iterator[Problem]:
    """Yield what keeps a stage from using its optimizer: the name, a missing package, arguments, the schedule."""
    settings = stage.optimizer
    name = settings.optim
    if name in UNSUPPORTED:
        message = f"'{name}' {UNSUPPORTED[name]}. To save memory use adamw_torch_8bit or adafactor."
        yield Problem((*place, "optim"), message)
        return
    for module, (package, names) in PACKAGES.items():
        if name in names and importlib.util.find_spec(module) is None:
            message = f"'{name}' needs the package '{module}', which is not installed: pip install {package}"
            yield Problem((*place, "optim"), message)
            return
    try:
        kind, _ = optimizer_class(settings)
    except (ImportError, ValueError, RuntimeError) as error:
        yield Problem((*place, "optim"), f"'{name}' cannot be used here: {error}")
        return
    yield from _argument_problems(settings, kind, place)
    if name.startswith("schedule_free"):
        if settings.schedule != "constant":
            message = (
                f"'{name}' takes the place of a schedule. Use schedule: constant, and args: {{warmup_steps: N}} for a "
                "warm-up"
            )
            yield Problem((*place, "optim"), message)
        if stage.ema is not None or (stage.evaluation is not None and stage.evaluation.patience is not None):
            message = f"'{name}' averages weights itself and does not go with ema or with evaluation.patience"
            yield Problem((*place, "optim"), message)


def _argument_problems(settings: Optimizer, kind: type, place: YamlPath) -> Iterator[Problem]:
    """Yield the arguments that the class of an optimizer does not have."""
    known = [name for name in inspect.signature(kind).parameters if name not in ("params", *OWN_KEYS)]
    for name in settings.args:
        if name in OWN_KEYS:
            yield Problem((*place, "args"), f"{name} is a key of optimizer itself: optimizer: {{{name}: …}}", on="key")
        elif name not in known:
            message = (
                f"'{settings.optim}' has no argument '{name}'.{suggest(name, known)} It has {', '.join(sorted(known))}"
            )
            yield Problem((*place, "args"), message, on="key")
    has_betas = "betas" in inspect.signature(kind).parameters
    if not has_betas and settings.betas != Optimizer().betas:
        yield Problem((*place, "betas"), f"'{settings.optim}' has no betas. Leave them out", on="key")
