"""Micro-batches of unequal padding, labels and length give the loss and the gradients of one large batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.training.test_aligner import plan_of
from xarch_kd.calibration.initialize import prepare, tokens_to_prepare
from xarch_kd.data.batches import Batch
from xarch_kd.models.conversion.convert import convert
from xarch_kd.objectives.normalizers import LossNormalizers
from xarch_kd.taps.trace import trace
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner, AlignerOutput

# Tokens of each row, of which the first ones are a prompt; the last two rows are a micro-batch that is shorter, too.
LENGTHS, PROMPTS, SPLIT = (16, 11, 7, 12, 3), (2, 6, 1, 9, 1), 3


def _entry(tap: str, kind: str, layers: str = "same", projector: str = "auto", **loss: Any) -> dict[str, Any]:
    return {
        "align": [{"name": "e", "tap": tap, "layers": layers, "projector": projector, "loss": {"kind": kind, **loss}}]
    }


def _tokens(divergence: Any, **more: Any) -> dict[str, Any]:
    return {"tokens": {"divergence": divergence, "cross_entropy": 0.3, "temperature": 2.0, **more}}


FEATURES = ("mse", "relative_mse", "cosine", "normalised_mse", "huber", "l2")
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "total_variation",
    *({"kind": kind} for kind in ("jsd", "skew_forward_kl", "skew_reverse_kl", "alpha", "renyi")),
)
# Of a hybrid of attention and Mamba-2, and of a Transformer with other weights.
HYBRID = {
    **{kind: _entry("hidden", kind) for kind in FEATURES},
    "projected": _entry("hidden", "mse", projector="linear"),
    **{f"standardized-{kind}": _entry("hidden", kind, standardize=True) for kind in ("relative_mse", "gram")},
    "fed": {**_entry("mixer_output", "relative_mse", "replaced"), "inputs": "teacher", "train": ["mixers"]},
    "gram": _entry("hidden", "gram"),
    "bridge": _entry("mixing", "attention_bridge", "replaced"),
    **{
        f"mixing-{distance}": _entry("mixing", "mixing", "replaced", distance=distance)
        for distance in ("cosine", "frobenius", "relative_frobenius")
    },
    "panels": _entry("mixing", "mixing", "replaced", distance="frobenius", impl="panels"),
    **{
        "tokens-" + (divergence if isinstance(divergence, str) else divergence["kind"]): _tokens(divergence)
        for divergence in DIVERGENCES
    },
}
HYBRID |= {
    f"labelled-{name}": {**HYBRID[name], "align": [{**HYBRID[name]["align"][0], "tokens": "labelled"}]}
    for name in ("mse", "relative_mse", "cosine", "gram", "mixing-cosine", "fed")
}
TRANSFORMER = {
    "relation": _entry("values", "relation"),
    **{f"relation-{of}": _entry("mixing", "relation", of=of) for of in ("queries", "keys")},
    "bridge": _entry("mixing", "attention_bridge", distance="cosine"),
    **{f"mixing-{distance}": _entry("mixing", "mixing", distance=distance) for distance in ("kl", "cross_entropy")},
    "everything": {
        "align": [
            *_entry("hidden", "relative_mse")["align"],
            {**_entry("mixing", "mixing")["align"][0], "name": "map"},
        ],
        **_tokens("forward_kl"),
    },
}


def large_and_small() -> tuple[Batch, list[Batch]]:
    """Return rows of unequal length as one batch, and as two micro-batches."""
    ids = torch.randint(2, 97, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    position = torch.arange(ids.shape[1])
    mask = position < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~mask | (position < torch.tensor(PROMPTS)[:, None]), -100)

    def part(rows: slice, time: int) -> Batch:
        ids_, mask_, labels_ = (tensor[rows, :time] for tensor in (ids, mask, labels))
        return Batch(input_ids=ids_, attention_mask=mask_, labels=labels_)

    time = ids.shape[1]
    short = max(LENGTHS[SPLIT:])
    return part(slice(None), time), [part(slice(SPLIT), time), part(slice(SPLIT, None), short)]


def run(aligner: Aligner, batches: list[Batch]) -> tuple[list[AlignerOutput], dict[str, Tensor]]:
    """Return the outputs of a step's micro-batches and the gradients that they add up to."""
    aligner.zero_grad()
    features = [aligner.reader.read(batch) for batch in batches]
    normalizers = LossNormalizers()
    for batch, read in zip(batches, features, strict=True):
        normalizers = normalizers + aligner.normalizers(batch, read)
    outputs = []
    for batch, read in zip(batches, features, strict=True):
        outputs.append(aligner(batch=batch, features=read, normalizers=normalizers))
        outputs[-1].loss.backward()
    gradients = {name: p.grad.clone() for name, p in aligner.named_parameters() if p.grad is not None}
    return outputs, gradients


def total(outputs: list[AlignerOutput]) -> float:
    return float(torch.stack([output.loss.detach() for output in outputs]).sum())


def aligner_of(folder: Path, teacher: PreTrainedModel, stage: dict[str, Any], hybrid: bool) -> Aligner:
    student = convert(teacher, replace=[1], check=False) if hybrid else tiny_model("llama", seed=1)
    config = {} if hybrid else {"model": str(folder)}
    aligner = Aligner(plan_of(folder, stage, **config), teacher=teacher, student=student)
    with torch.no_grad():
        # A conversion that is near its teacher has gradients of rounding size.
        for name, parameter in student.named_parameters():
            if "norm" in name:
                parameter.mul_(1.1)
    if tokens_to_prepare(aligner):
        ids = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(1))
        prepare(aligner, [Batch(input_ids=ids)])
    return aligner


@pytest.mark.parametrize(
    ("name", "hybrid"), [*((name, True) for name in HYBRID), *((name, False) for name in TRANSFORMER)]
)
def test_micro_batches_add_up_to_one_large_batch(
    teacher_folder: Path, teacher: PreTrainedModel, name: str, hybrid: bool
) -> None:
    aligner = aligner_of(teacher_folder, teacher, (HYBRID if hybrid else TRANSFORMER)[name], hybrid)
    large, small = large_and_small()
    (whole,), expected = run(aligner, [large])
    outputs, found = run(aligner, small)
    assert total(outputs) == pytest.approx(float(whole.loss.detach()), rel=2e-5)
    assert found.keys() == expected.keys() and expected
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert scale > 1e-6
    worst = max(float((found[parameter] - expected[parameter]).norm() / scale) for parameter in expected)
    assert worst < 1e-4
    # The mean of the micro-batches' own losses is another number: they differ in what counts.
    with torch.no_grad():
        apart = torch.stack([aligner(batch=batch).loss for batch in small])
    assert float(apart.mean()) != pytest.approx(float(whole.loss.detach()), rel=5e-5)


def test_labelled_tokens_alone_count_where_that_is_asked_for(teacher_folder: Path, teacher: PreTrainedModel) -> None:
    """Against the mean over the dense features of the labelled tokens."""
    large, small = large_and_small()
    assert large.labels is not None and large.labelled_mask is not None
    labelled = large.labels != -100
    assert torch.equal(large.labelled_mask, labelled) and large.labelled_tokens == int(labelled.sum()) < large.tokens
    entry = _entry("hidden", "mse")["align"][0]
    aligner = aligner_of(teacher_folder, teacher, {"align": [{**entry, "tokens": "labelled"}]}, hybrid=True)
    with torch.no_grad():
        own, target = (
            trace(model, large.input_ids, large.model_mask, taps=["hidden"])["hidden"]
            for model in (aligner.student, teacher)
        )
        errors = torch.stack([(own[layer] - target[layer]).square().mean(-1) for layer in own])
        out = aligner(batch=large)
    assert float(out.loss) == pytest.approx(float(errors[:, labelled].mean(1).sum()), rel=1e-4)
    assert float(out.loss) != pytest.approx(float(errors[:, large.attention_mask].mean(1).sum()), rel=1e-3)
    # A micro-batch in which nothing is labelled adds nothing.
    empty = Batch(input_ids=large.input_ids[:1], labels=torch.full_like(large.input_ids[:1], -100))
    outputs, _ = run(aligner, [*small, empty])
    assert float(outputs[-1].loss.detach()) == 0.0
    assert total(outputs) == pytest.approx(float(out.loss), rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "hybrid"),
    [
        (_entry("hidden", "cka"), True),
        (_entry("mixing", "mixing", heads="learned"), False),
        (_entry("hidden", "mse", layers="learned"), True),
    ],
    ids=["cka", "learned-heads", "learned-map"],
)
def test_ratios_of_batch_statistics_add_up_to_their_mean_by_tokens(
    teacher_folder: Path, teacher: PreTrainedModel, stage: dict[str, Any], hybrid: bool
) -> None:
    """CKA and the objectives of learned maps are ratios of sums over a batch, so no sum of micro-batches is theirs.

    What micro-batches give is the mean of their own values, weighted by tokens; the losses themselves, which learned
    maps weigh, still add up.
    """
    aligner = aligner_of(teacher_folder, teacher, stage, hybrid)
    large, small = large_and_small()
    outputs, _ = run(aligner, small)
    own = [run(aligner, [batch])[0][0].parts for batch in small]
    whole = run(aligner, [large])[0][0].parts
    shares = [batch.tokens / large.tokens for batch in small]
    for name in whole:
        found = sum(float(output.parts[name]) for output in outputs)
        mean = sum(share * float(parts[name]) for share, parts in zip(shares, own, strict=True))
        assert found == pytest.approx(mean, rel=1e-4), name


def test_normalizers_are_summed_over_ranks_in_one_call(teacher_folder: Path, teacher: PreTrainedModel) -> None:
    aligner = aligner_of(teacher_folder, teacher, TRANSFORMER["everything"], hybrid=False)
    large, small = large_and_small()
    first, second = (aligner.normalizers(batch, aligner.reader.read(batch)) for batch in small)
    vectors: list[Tensor] = []
    second.reduced(lambda vector: vectors.append(vector) or vector)
    together = first.reduced(lambda vector: vector + vectors[0])
    expected = aligner.normalizers(large, aligner.reader.read(large))
    assert len(vectors) == 1
    counts = (large.tokens, large.labelled_tokens, large.predictions)
    assert (float(together.tokens), float(together.labelled), float(together.predictions)) == counts
    assert together.teacher_sq_norms.keys() == expected.teacher_sq_norms.keys() and together.teacher_sq_norms
    for name, norm in expected.teacher_sq_norms.items():
        torch.testing.assert_close(together.teacher_sq_norms[name], norm, rtol=1e-6, atol=0)
