"""Cases of `calibration`: similarity of every layer of a student to every layer of a teacher before training.

The teacher is a Llama of SmolLM2-135M's sizes, the student a Mamba-2 of 12 layers; weights are random, since no figure
depends on them. The cost of `layer_similarity` beyond the teacher's pass, which is the student's pass and the sums of
similarity, is measured with a teacher whose layers compute nothing. The other contenders are the whole calibration, and
the teacher's own pass with and without its head.

FLOPs, n tokens: 2n per weight of the teacher's layers and head. Attention and elementwise work are not included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.case import Bound, Case, Contender, Growth, Input, Inputs, Options, Run, Sizes
from benchmarks.cases.alignment import student_settings, token_ids

# As many tokens at a time as in the calibration pass.
TOKENS_AT_A_TIME: Final = 1024
TAP: Final = "hidden"
QUERIES_A_KEY: Final = 3


def teacher_model(sizes: Options, *, idle: bool = False) -> Any:
    """Return a Llama with heads of 64, three queries per key and an MLP of 8/3 of the hidden size, as SmolLM2-135M has.

    Layers of an `idle` one compute nothing: each returns a copy of its input.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    width = sizes["teacher_width"]
    keys = max(1, width // (64 * QUERIES_A_KEY))
    config = AutoConfig.for_model(
        "llama",
        vocab_size=sizes["vocabulary"],
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=sizes["teacher_layers"],
        num_attention_heads=keys * QUERIES_A_KEY,
        num_key_value_heads=keys,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if idle:
        for block in model.model.layers:
            block.forward = lambda hidden, *_, **__: hidden.clone()
    return model


def forward(head: bool) -> Callable[[Options], Run]:
    """Return `make` of the teacher's own pass over all rows, with logits or up to the last hidden states."""

    def make(options: Options) -> Run:
        teacher = teacher_model(options)
        model = teacher if head else teacher.model
        rows = max(1, TOKENS_AT_A_TIME // options["time"])

        @torch.no_grad()
        def run(inputs: Inputs) -> Tensor:
            last = torch.zeros(())
            for part in token_ids(inputs["text"], options["vocabulary"]).split(rows):
                last = model(input_ids=part, use_cache=False)[0][0, -1, 0]
            return last

        return run

    return make


def calibration(*, idle: bool) -> Callable[[Options], Run]:
    """Return `make` of the calibration pass, with the teacher or an idle one."""

    def make(options: Options) -> Run:
        from xarch_kd.calibration.layer_similarity import layer_similarity
        from xarch_kd.data.batches import Batch
        from xarch_kd.taps.layout import layout_of
        from xarch_kd.testing.tiny import tiny_model

        settings = student_settings({**options, "layers": options["student_layers"]})
        teacher, student = layout_of(teacher_model(options, idle=idle)), layout_of(tiny_model("mamba2", **settings))

        def run(inputs: Inputs) -> Tensor:
            ids = token_ids(inputs["text"], options["vocabulary"])
            size = max(1, TOKENS_AT_A_TIME // options["time"])
            batches = [Batch(input_ids=part.long()) for part in ids.split(size)]
            return layer_similarity(TAP, teacher, student, batches).sum()

        return run

    return make


def flops(sizes: Sizes) -> int:
    """Return the FLOPs of the products with the teacher's weights, which are the baseline's."""
    width = sizes["teacher_width"]
    block = width**2 * (2 + 2 / QUERIES_A_KEY) + 3 * width * (width * 8 // 3)
    tokens = sizes["rows"] * sizes["time"]
    return round(2 * tokens * (sizes["teacher_layers"] * block + sizes["vocabulary"] * width))


CONTENDERS: Final[dict[str, Contender]] = {
    "teacher": Contender(make=forward(True), source="transformers: the model called as it is"),
    "teacher without head": Contender(make=forward(False), source="transformers: its base model"),
    "calibration": Contender(make=calibration(idle=False), source="xarch_kd", ours=True),
    "calibration beyond the teacher": Contender(make=calibration(idle=True), source="xarch_kd", ours=True),
}


def case(student_width: int) -> Case:
    """Return a case on the CPU: 16384 tokens in rows of 512."""
    return Case(
        operation="calibration",
        name=f"12 × 30 layers, student width {student_width}",
        group=f"calibration, student width {student_width}",
        baseline="teacher",
        sizes={
            "rows": 32,
            "time": 512,
            "vocabulary": 49152,
            "teacher_layers": 30,
            "teacher_width": 576,
            "student_layers": 12,
            "student_width": student_width,
        },
        quick={
            "rows": 8,
            "time": 16,
            "vocabulary": 97,
            "teacher_layers": 3,
            "teacher_width": 192,
            "student_layers": 2,
            "student_width": 32,
        },
        warm={"rows": 8},
        inputs={"text": Input(axes=("rows", "time"), transform="share")},
        contenders=CONTENDERS,
        flops=flops,
        dense_flops=None,
        whole="each call is a whole pass over all rows, without gradients",
        bounds=(
            Bound(contender="calibration beyond the teacher", measure="time", at_most=1.0),
            Bound(
                contender="calibration beyond the teacher", measure="time", at_most=1.0, against="teacher without head"
            ),
        ),
    )


CASES: Final[tuple[Case, ...]] = (case(384),)
GROWTHS: Final[tuple[Growth, ...]] = ()
