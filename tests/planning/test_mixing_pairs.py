"""Pairs of mixing matrices in a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xarch_kd.errors import MappingFileError
from xarch_kd.models.loading.load import meta_model
from xarch_kd.planning.mixing_sizes import mixing_size
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.render import render_plan
from xarch_kd.taps.layout import layout_of
from xarch_kd.taps.trace import trace
from xarch_kd.testing.recurrent import SIZES as RECURRENT
from xarch_kd.testing.recurrent import recurrent_model
from xarch_kd.testing.tiny import SIZES, tiny_config, tiny_model

PlanOf = Callable[[str], Plan]
FolderOf = Callable[..., str]

FILE = """\
version: 1
teacher: {{model: '{teacher}', dtype: bfloat16}}
student: {student}
data: {{builtin: python-docs, sequence_length: 64, batch_size: 2}}
stages:
  - name: one
    steps: 4
    batches: 2
    train: [mixers]
    inputs: {inputs}
    cache: {cache}
    align:
      - name: match
        tap: mixing
        layers: {layers}
        loss: {{kind: mixing{loss}}}
"""
CONVERTED = "{convert: {mixer: mamba2, replace: [1]}}"


def file(teacher: str, student: str = CONVERTED, **values: Any) -> str:
    defaults = {"inputs": "teacher", "cache": "memory", "layers": "replaced", "loss": ""}
    return FILE.format(teacher=teacher, student=student, **{**defaults, **values})


def first_lines(plan_of: PlanOf, content: str) -> list[str]:
    with pytest.raises(MappingFileError) as caught:
        plan_of(content)
    return [problem.splitlines()[0].partition("map.yaml:")[2] for problem in caught.value.problems]


def test_heads_cache_and_work(plan_of: PlanOf, folder_of: FolderOf) -> None:
    config: Any = tiny_config("llama")
    plan = plan_of(file(folder_of("llama")))
    (pair,) = plan.stages[0].pairs
    assert (pair.name, pair.tap, pair.loss, pair.projector) == ("match.1", "mixing", "mixing", "none")
    assert (pair.student_heads, pair.teacher_heads) == (config.num_attention_heads,) * 2
    # Queries and keys of one block, and the mixer's input, in bfloat16; 2 batches of 2 x 64 tokens.
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    numbers = (config.num_attention_heads + config.num_key_value_heads) * head_dim + config.hidden_size
    assert plan.stages[0].cache_bytes == 2 * 2 * 64 * numbers * 2
    without = plan_of(file(folder_of("llama")).replace("tap: mixing", "tap: mixer_output").replace("mixing}", "mse}"))
    # One product of the teacher's heads and three of the student's, 64 tokens long, over 4 steps of 128 tokens.
    state = plan.student_config["mamba_d_state"]
    products = 64 * config.num_attention_heads * (head_dim + 3 * state)
    assert plan.stages[0].flops - without.stages[0].flops == pytest.approx(products * 128 * 4)


def test_what_it_looks_like(plan_of: PlanOf, folder_of: FolderOf) -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_plan(plan_of(file(folder_of("llama"), loss=", distance: frobenius"))))
    assert "1: (2, 4, 64 × 64)" in capture.get()
    assert "match (frobenius)" in capture.get()


def test_kl_is_for_two_softmax_rows(plan_of: PlanOf, folder_of: FolderOf) -> None:
    assert first_lines(plan_of, file(folder_of("llama"), loss=", distance: kl")) == [
        "16:40: stages[0].align[0].loss.distance: kl compares rows that are distributions, and block 1 of the student "
        "(mamba2) and block 1 of the teacher (attention) are not both attention. Use cosine, frobenius or "
        "relative_frobenius."
    ]
    folder = folder_of("llama")
    student = f"{{model: '{folder}'}}"
    plan = plan_of(file(folder, student, layers="same", loss=", distance: kl", inputs="student", cache="off"))
    assert {pair.loss for pair in plan.stages[0].pairs} == {"mixing"}


def test_a_sketch_is_for_frobenius(plan_of: PlanOf, folder_of: FolderOf) -> None:
    found = first_lines(plan_of, file(folder_of("llama"), loss=", impl: sketch"))
    assert found == [
        "16:36: stages[0].align[0].loss.impl: impl: sketch estimates distance: frobenius alone. "
        "Use it, or another impl."
    ]
    assert plan_of(file(folder_of("llama"), loss=", impl: sketch, distance: frobenius"))


@pytest.mark.parametrize(("loss", "place"), [("", "16:15: stages[0].align[0].loss"), (", heads: mean", "16:37: ")])
def test_counts_of_heads_that_no_rule_bridges(plan_of: PlanOf, folder_of: FolderOf, loss: str, place: str) -> None:
    teacher = folder_of("llama")
    student = folder_of("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16)
    values = {"layers": "same", "inputs": "student", "cache": "off", "loss": loss}
    found = first_lines(plan_of, file(teacher, f"{{config: '{student}'}}", **values))
    assert len(found) == len(set(found)) == 1
    assert found[0].startswith(place)
    assert "3 student heads and 4 teacher heads" in found[0]


@pytest.mark.parametrize("model_type", [*SIZES, *RECURRENT])
def test_sizes_are_those_of_what_is_read(model_type: str) -> None:
    model: Any = tiny_model(model_type) if model_type in SIZES else recurrent_model(model_type, seed=0)
    layout = layout_of(model)
    for kind in dict.fromkeys(layout.mixer_kinds):
        layer = layout.mixer_kinds.index(kind)
        size = mixing_size(layout_of(meta_model(model.config)), layer)
        if size is None:
            assert kind not in ("attention", "mamba", "mamba2", "gated_delta")
            continue
        with torch.no_grad():
            mixing = trace(layout, torch.zeros(1, 8, dtype=torch.long), taps=["mixing"], layers=[layer]).at(
                "mixing", layer
            )
        assert mixing.heads == size.heads, kind
        # Multi-head latent attention keeps part of its queries and keys elsewhere than a config says.
        if model_type != "kimi_linear" and kind in ("attention", "mamba2"):
            in_time = [factor for factor in mixing.factors.values() if factor.shape[:2] == (1, 8)]
            assert sum(factor.numel() for factor in in_time) == 8 * size.numbers, kind
