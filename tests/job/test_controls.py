"""Controls of a recipe: the unconverted teacher, and the teacher's features of other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xarch_kd.cli.app import main
from xarch_kd.errors import MappingFileError
from xarch_kd.job.train import train
from xarch_kd.mixing import SSDMixing
from xarch_kd.models.conversion.convert import convert
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan
from xarch_kd.taps.sites import Site
from xarch_kd.teacher.feature_cache import of_other_rows
from xarch_kd.testing.mapping import LOGIT_STAGE, MIXER_STAGE, Write
from xarch_kd.testing.runs import same, signal_after, student_of
from xarch_kd.testing.tiny import tiny_model
from xarch_kd.training.aligner import Aligner

RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11, "float16": 1e11})


def test_unchanged_trains_the_attention_of_the_same_blocks_in_the_stages_that_apply(
    write_mapping: Write, tmp_path: Path, teacher_folder: Path
) -> None:
    plan = make_plan(write_mapping(), control="unchanged", rates=RATES)
    assert [stage.stage.name for stage in plan.stages] == ["logits"]
    assert plan.warnings[0] == (
        "control: unchanged: the student is the teacher itself, no mixer is replaced. It trains in the stages logits; "
        "left out, as they match new mixers to attention: mixers"
    )
    run = train(plan, tmp_path / "run")
    teacher, student = load_file(teacher_folder / "model.safetensors"), student_of(tmp_path / "run")
    changed = {name for name in student if name in teacher and not torch.equal(student[name], teacher[name])}
    assert changed == {name for name in teacher if ".self_attn." in name and (".1." in name or ".2." in name)}
    assert run.metrics["logits/loss"] > 0


def test_a_control_is_recorded_and_not_resumed_with_another(
    write_mapping: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, run = write_mapping(), tmp_path / "run"
    command = ["train", str(mapping), "--output", str(run), "--control", "shuffled"]
    with signal_after(5):
        assert main(command) == 130
    assert f"xarch-kd {' '.join(command[:4])} --resume --control shuffled" in capsys.readouterr().err
    for other in ([], ["--control", "unchanged"]):
        assert main([*command[:4], "--resume", *other]) == 2
        assert "control" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "control: shuffled" in (run / "mapping.yaml").read_text()
    assert main(["evaluate", str(run), "--suites", "likelihood", "--tokens", "64"]) == 0
    train(make_plan(mapping, control="shuffled", rates=RATES), tmp_path / "whole")
    assert same(student_of(run), student_of(tmp_path / "whole"))


def test_shuffled_is_the_loss_with_the_teachers_rows_exchanged(write_mapping: Write) -> None:
    path = write_mapping()
    teacher = tiny_model("llama", num_hidden_layers=4)
    ids = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(1))
    for stage, shared in ((0, "mixer_input"), (1, None)):
        own, other = (
            Aligner(
                make_plan(path, control=control, rates=RATES),
                teacher=teacher,
                student=convert(teacher, mixer="mamba2", replace=[1, 2]),
                stage=stage,
            )
            for control in ("none", "shuffled")
        )
        from xarch_kd.data.batches import Batch

        batch = Batch(input_ids=ids)
        features: dict[Any, Any] = dict(own.reader.read(batch))
        exchanged = {site: feature if site.tap == shared else feature[[1, 2, 0]] for site, feature in features.items()}
        assert any(isinstance(site, Site) for site in exchanged)
        expected = own(batch=batch, features=exchanged).loss
        assert torch.equal(other(batch=batch, features=features).loss, expected)
        assert not torch.equal(own(batch=batch, features=features).loss, expected)


def test_factors_that_rows_share_stay_and_a_single_row_is_shifted() -> None:
    drawn = torch.Generator().manual_seed(0)
    mixing = SSDMixing(
        C=torch.randn(2, 6, 1, 4, generator=drawn),
        B=torch.randn(2, 6, 1, 4, generator=drawn),
        log_decay=-torch.rand(2, 6, 2, generator=drawn),
        dt=torch.rand(2, 6, 2, generator=drawn),
        D=torch.randn(2, generator=drawn),
    )
    other: Any = of_other_rows(mixing)
    assert torch.equal(other.dense(), mixing.dense()[[1, 0]])
    row = torch.arange(6).view(1, 6, 1)
    shifted: Any = of_other_rows(row)
    assert shifted.flatten().tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("control", "changes", "message"),
    [
        ("unchanged", {"student": {"config": {"model_type": "mamba2"}}}, "Use it with student.convert"),
        ("unchanged", {"stages": [MIXER_STAGE]}, "leaves out stages with inputs: teacher, which all are"),
        ("shuffled", {"data": {"builtin": "python-docs", "packing": "none"}}, "exchanges the features of whole rows"),
        ("shuffled", {"stages": [{**LOGIT_STAGE, "batch_size": 1}]}, "needs two rows in each micro-batch"),
    ],
    ids=["fresh", "mixers-only", "lengths", "one-row"],
)
def test_controls_that_do_not_apply_are_refused(
    write_mapping: Write, control: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MappingFileError) as caught:
        make_plan(write_mapping(*changes.pop("stages", []), **changes), control=control, rates=RATES)
    assert message in "\n".join(caught.value.problems)
