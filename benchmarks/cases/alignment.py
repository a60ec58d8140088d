"""Cases of `alignment`: a whole training step, with and without matched hidden states besides the logits.

The teacher is a tiny Llama of 8 layers, the student a fresh Mamba-2 of 8 narrower layers, and the step that of the
package's own `Aligner` for the plan of a mapping file: teacher features, student, losses, backward, clipping of the
gradient norm, AdamW. Hidden states are compared by `normalised_mse` through one linear projector per pair.

A smaller vocabulary makes the logits cheaper and the share of everything else larger.

FLOPs, n tokens of which m predict the next: 2n per weight of the teacher's layers, 6n per weight of the student's, and
2mV(3 student dim + teacher dim) for the heads. Attention, recurrences and elementwise work are not included.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.case import Bound, Case, Contender, Growth, Input, Inputs, Options, Run, Sizes

TIME: Final = 512
# Pairs of layers of the same depth, spread evenly and ending with the last layer.
FOUR: Final = tuple({"student": layer, "teacher": layer} for layer in (1, 3, 5, 7))
STATE: Final = 64


def teacher_settings(sizes: Options) -> dict[str, Any]:
    """Return the sizes of the teacher's config: heads of 32, an MLP of 8/3 of the hidden size."""
    width = sizes["teacher_width"]
    return {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": width,
        "intermediate_size": 32 * round(width / 12),
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": max(1, width // 32),
        "num_key_value_heads": max(1, width // 32),
        "max_position_embeddings": sizes["time"],
        "tie_word_embeddings": True,
    }


def student_settings(sizes: Options) -> dict[str, Any]:
    """Return the sizes of the student's config: an inner size of twice its hidden size, in heads of 32."""
    width = sizes["student_width"]
    return {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": width,
        "num_hidden_layers": sizes["layers"],
        "state_size": STATE,
        "expand": 2,
        "head_dim": 32,
        "num_heads": 2 * width // 32,
        "n_groups": 1,
        "chunk_size": 64,
        "tie_word_embeddings": True,
    }


def mapping(folder: Path, sizes: Options, layers: Any) -> dict[str, Any]:
    """Return a mapping file with one stage that trains the whole student and matches hidden states at `layers`."""
    align = {
        "name": "stream",
        "tap": "hidden",
        "layers": layers,
        "projector": "linear",
        "loss": {"kind": "normalised_mse"},
    }
    stage = {"name": "one", "steps": 1, "train": ["all"], "tokens": {"divergence": "forward_kl"}}
    return {
        "version": 1,
        "teacher": {"model": str(folder / "teacher")},
        "student": {"config": str(folder / "student")},
        "data": {"builtin": "python-docs", "sequence_length": sizes["time"], "batch_size": sizes["batch"]},
        "device": "cpu",
        "stages": [stage if layers is None else {**stage, "align": [align]}],
    }


def aligner_of(sizes: Options, layers: Any) -> nn.Module:
    """Return the `Aligner` of the mapping file's stage, with both models built from fixed seeds."""
    from xarch_kd.mapping_file.schema import MappingFile
    from xarch_kd.planning.resolve import make_plan
    from xarch_kd.testing.tiny import tiny_model
    from xarch_kd.training.aligner import Aligner

    teacher = tiny_model("llama", **teacher_settings(sizes))
    student = tiny_model("mamba2", seed=1, **student_settings(sizes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A plan reads configs only.
        teacher.config.save_pretrained(folder / "teacher")
        student.config.save_pretrained(folder / "student")
        plan = make_plan(MappingFile.model_validate_json(json.dumps(mapping(folder, sizes, layers))))
    return Aligner(plan, teacher=teacher, student=student)


def step(layers: Any) -> Any:
    """Return `make` of the training step with hidden states matched at `layers`, None for logits only."""

    def make(options: Options) -> Run:
        aligner = aligner_of(options, layers)
        trained = [parameter for parameter in aligner.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def run(inputs: Inputs) -> Tensor:
            loss = aligner(token_ids(inputs["text"], options["vocabulary"])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    return make


def token_ids(text: Tensor, vocabulary: int) -> Tensor:
    """Return token ids [batch, time] from shares of the vocabulary."""
    return (text * vocabulary).long().clamp(max=vocabulary - 1)


def flops(sizes: Sizes) -> int:
    """Return the FLOPs of the products with weights in a step that compares logits alone, forward and backward."""
    teacher, student, batch, time = (sizes[name] for name in ("teacher_width", "student_width", "batch", "time"))
    transformer = 4 * teacher**2 + 3 * teacher * 32 * round(teacher / 12)
    inner = 2 * student
    mamba = student * (2 * inner + 2 * STATE + inner // 32) + inner * student
    heads = sizes["vocabulary"] * (teacher + 3 * student)
    return 2 * batch * (time * sizes["layers"] * (transformer + 3 * mamba) + (time - 1) * heads)


CONTENDERS: Final[dict[str, Contender]] = {
    "logits only": Contender(make=step(None), source="xarch_kd", ours=True),
    "logits, hidden of 4 pairs": Contender(make=step(FOUR), source="xarch_kd", ours=True),
    "logits, hidden of 8 pairs": Contender(make=step("uniform"), source="xarch_kd", ours=True),
}
ADDED: Final = (
    Bound(contender="logits, hidden of 4 pairs", measure="time", at_most=1.15),
    Bound(contender="logits, hidden of 4 pairs", measure="memory", at_most=1.20),
)


def case(vocabulary: int) -> Case:
    """Return a case on the CPU."""
    return Case(
        operation="alignment",
        name=f"step, V={vocabulary}",
        group="step over V",
        baseline="logits only",
        sizes={
            "batch": 4,
            "time": TIME,
            "vocabulary": vocabulary,
            "layers": 8,
            "teacher_width": 256,
            "student_width": 192,
        },
        quick={"batch": 2, "time": 16, "vocabulary": 97, "teacher_width": 64, "student_width": 32},
        inputs={"text": Input(axes=("batch", "time"), transform="share")},
        contenders=CONTENDERS,
        flops=flops,
        dense_flops=None,
        whole="each call is a whole training step",
        bounds=ADDED,
    )


# SmolLM2's vocabulary, and a small one, with the largest share of everything that is not logits.
CASES: Final[tuple[Case, ...]] = tuple(case(vocabulary) for vocabulary in (49152, 8192))
GROWTHS: Final[tuple[Growth, ...]] = ()
