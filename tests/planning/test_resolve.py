from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from xarch_kd.errors import ConversionError, MappingFileError, ModelError, TapError, XarchError
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.models.conversion import convert as convert_module
from xarch_kd.models.loading import load
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.layer_maps import entry_key
from xarch_kd.planning.plan import Plan
from xarch_kd.planning.resolve import calibrated_plan, make_plan

PlanOf = Callable[[str], Plan]
FolderOf = Callable[..., str]

STAGE = """\
  - name: {name}
    steps: 4
    train: [{train}]
    inputs: {inputs}
    align:
      - name: match
        tap: {tap}
        {layers}
"""
HEAD = """\
version: 1
teacher: {{model: '{teacher}'}}
student: {{{student}}}
data: {{builtin: python-docs, sequence_length: 64, batch_size: 2}}
stages:
"""


def text(teacher: str, student: str, *stages: str) -> str:
    return HEAD.format(teacher=teacher, student=student) + "".join(stages)


def stage(
    *, name: str = "one", train: str = "mixers", inputs: str = "teacher", tap: str = "mixer_output",
    layers: str = "layers: replaced", more: str = "",
) -> str:  # fmt: skip
    return STAGE.format(name=name, train=train, inputs=inputs, tap=tap, layers=layers) + more


def convert(selection: str) -> str:
    return f"convert: {{mixer: mamba2, {selection}}}"


def first_lines(plan_of: PlanOf, content: str) -> list[str]:
    with pytest.raises(MappingFileError) as caught:
        plan_of(content)
    return [problem.splitlines()[0].partition("map.yaml:")[2] for problem in caught.value.problems]


def test_the_good_file_gives_the_whole_plan(good: str, plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(good.replace("./teacher", folder_of("llama", num_hidden_layers=4)))
    assert [row.mixer for row in plan.teacher.layers] == ["attention"] * 4
    # `every 2` keeps blocks 1 and 3.
    assert [(row.mixer, row.replaced) for row in plan.student.layers] == [
        ("mamba2", True),
        ("attention", False),
        ("mamba2", True),
        ("attention", False),
    ]
    mixers, logits = plan.stages
    assert [(pair.name, pair.student_layer, pair.teacher_layer) for pair in mixers.pairs] == [
        ("mixer-output.0", 0, 0),
        ("mixer-output.2", 2, 2),
    ]
    assert {(pair.student_dim, pair.teacher_dim, pair.projector, pair.loss) for pair in mixers.pairs} == {
        (64, 64, "none", "relative_mse")
    }
    assert all(".mamba." in name and (".0." in name or ".2." in name) for name in mixers.trainable)
    assert (mixers.tokens_per_step, mixers.tokens, mixers.distinct_batches) == (128, 512, 4)
    # Two pairs, each fed by mixer_input and compared at mixer_output: 4 sites of 64 bfloat16 numbers, 4 batches.
    assert mixers.cache_bytes == 4 * 64 * 2 * 128 * 4
    assert logits.cache_bytes == 0 and logits.pairs == () and logits.trainable == mixers.trainable
    assert mixers.folder == "01-mixers" and mixers.align_of(mixers.pairs[0]).tap == "mixer_output"
    assert 0 < mixers.flops < logits.flops * 10 and mixers.seconds > 0 and mixers.peak_bytes > 0
    assert plan.student_config["model_type"] == "granitemoehybrid"
    assert plan.warnings == (
        "stage mixers: every batch is drawn once, so the cache is never read; give fewer batches than steps, "
        "or cache: off",
    )


def test_counts_equal_those_of_real_models(plan_of: PlanOf, folder_of: FolderOf) -> None:
    from xarch_kd.models.loading.load import fresh_model, load_config, read_student_config

    teacher, student = folder_of("llama", num_hidden_layers=3), folder_of("mamba")
    plan = plan_of(
        text(
            teacher,
            f"config: '{student}'",
            stage(inputs="student", train="all", tap="hidden", layers="layers: uniform"),
        )
    )
    for summary, config in ((plan.teacher, load_config(teacher)), (plan.student, read_student_config(student))):
        real = fresh_model(config, seed=0)
        assert summary.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert plan.stages[0].trainable == tuple(name for name, _ in real.named_parameters())
    assert plan.stages[0].trainable_parameters == plan.student.parameters


def test_unequal_dims_get_a_projector(plan_of: PlanOf, folder_of: FolderOf) -> None:
    teacher, student = folder_of("llama", num_hidden_layers=4), folder_of("llama", hidden_size=32, num_hidden_layers=2)
    plan = plan_of(
        text(
            teacher,
            f"config: '{student}'",
            stage(inputs="student", train="all", tap="hidden", layers="layers: uniform"),
        )
    )
    assert [
        (pair.student_layer, pair.teacher_layer, pair.projector, pair.projector_parameters)
        for pair in plan.stages[0].pairs
    ] == [(0, 1, "linear", 32 * 64), (1, 3, "linear", 32 * 64)]
    assert plan.stages[0].projector_parameters == 2 * 32 * 64


def test_projector_none_with_unequal_dims(plan_of: PlanOf, folder_of: FolderOf) -> None:
    teacher, student = folder_of("llama"), folder_of("llama", hidden_size=32)
    content = text(
        teacher,
        f"config: '{student}'",
        stage(inputs="student", train="all", tap="hidden", layers="layers: same\n        projector: none"),
    )
    assert first_lines(plan_of, content) == [
        "14:20: stages[0].align[0].projector: the student is 32 wide and the teacher 64, so a projector is needed. "
        "Use auto or linear."
    ]


def test_layers_out_of_range_are_pointed_at_one_by_one(plan_of: PlanOf, folder_of: FolderOf) -> None:
    teacher = folder_of("llama", num_hidden_layers=4)
    pairs = "layers: [{student: 0, teacher: 4}, {student: 9, teacher: 0}]"
    assert first_lines(plan_of, text(teacher, convert("replace: [0]"), stage(layers=pairs))) == [
        "13:40: stages[0].align[0].layers[0].teacher: layer 4 is out of range: the teacher has 4 blocks, so 0 to 3 are "
        "allowed",
        "13:54: stages[0].align[0].layers[1].student: layer 9 is out of range: the student has 4 blocks, so 0 to 3 are "
        "allowed",
    ]


def test_a_block_to_replace_out_of_range(plan_of: PlanOf, folder_of: FolderOf) -> None:
    found = first_lines(plan_of, text(folder_of("llama", num_hidden_layers=4), convert("replace: [0, 7]"), stage()))
    assert len(found) == 1
    assert found[0].startswith("3:45: student.convert.replace: replace names block 7, but the model has 4 blocks")
    assert "allowed: 0 to 3" in found[0]


def test_problems_of_several_stages_are_told_at_once(plan_of: PlanOf, folder_of: FolderOf) -> None:
    content = text(
        folder_of("llama", num_hidden_layers=3),
        convert("replace: [1]"),
        stage(name="one", tap="head_input", layers="layers: same"),
        stage(name="two", layers="projector: auto"),
        stage(name="three", inputs="teacher", more="    tokens: {divergence: forward_kl}\n"),
    )
    assert [line.split(": ", 1)[1] for line in first_lines(plan_of, content)] == [
        "stages[0].align[0].tap: inputs: teacher runs single blocks, which have no head_input. Use a tap of blocks.",
        "stages[0].align[0].layers: the tap head_input is one for the whole model, so it has no layers. "
        "Leave this key out.",
        "stages[1].align[0].layers: required key is missing. It must be a strategy (same, uniform, cka, …) or a list "
        "of {student, teacher}.",
        "stages[2].tokens: with inputs: teacher each block runs on its own, so there are no next-token distributions. "
        "Use inputs: student, or a stage of its own.",
    ]


def test_inputs_teacher_needs_equal_dims(plan_of: PlanOf, folder_of: FolderOf) -> None:
    student = folder_of("mamba", hidden_size=32)
    content = text(folder_of("llama"), f"config: '{student}'", stage(layers="layers: uniform"))
    assert first_lines(plan_of, content)[0] == (
        "9:13: stages[0].inputs: inputs: teacher feeds the student's blocks what the teacher's were fed, so both must "
        "be equally wide; the teacher is 64 wide, the student 32. Use inputs: student."
    )


def test_replaced_without_a_replaced_block(plan_of: PlanOf, folder_of: FolderOf) -> None:
    content = text(folder_of("llama"), convert("keep_attention: all"), stage())
    assert "no mixer of the student was replaced" in first_lines(plan_of, content)[0]


def test_a_tap_that_a_family_lacks(plan_of: PlanOf, folder_of: FolderOf) -> None:
    content = text(
        folder_of("llama"),
        f"config: '{folder_of('mamba')}'",
        stage(inputs="student", train="all", tap="mlp_output", layers="layers: uniform"),
    )
    assert first_lines(plan_of, content) == [
        "12:14: stages[0].align[0].tap: the student is a mamba, whose blocks have no MLP that is known"
    ]


def test_pairs_that_nothing_reaches_are_left_out_with_a_notice(plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(
        text(folder_of("llama", num_hidden_layers=4), convert("replace: [1, 3]"), stage(layers="layers: same"))
    )
    assert [pair.student_layer for pair in plan.stages[0].pairs] == [1, 3]
    assert plan.warnings == ("stage one: match of blocks 0, 2 is left out, because nothing that trains reaches it",)


def test_downstream_blocks_are_reached_when_the_student_feeds_itself(plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(
        text(
            folder_of("llama", num_hidden_layers=4),
            convert("replace: [1]"),
            stage(inputs="student", tap="hidden", layers="layers: same"),
        )
    )
    assert [pair.student_layer for pair in plan.stages[0].pairs] == [1, 2, 3]


def test_a_stage_that_can_learn_nothing(plan_of: PlanOf, folder_of: FolderOf) -> None:
    content = text(folder_of("llama"), convert("replace: [1]"), stage(train="head"))
    assert first_lines(plan_of, content) == [
        "8:12: stages[0].train: nothing that trains here reaches any objective of this stage"
    ]


def test_what_trains_but_is_never_reached_is_noticed(plan_of: PlanOf, folder_of: FolderOf) -> None:
    plan = plan_of(text(folder_of("llama"), convert("replace: [1]"), stage(train="mixers, embeddings")))
    assert any("1 of 11 parameter tensors that it trains are reached by no objective" in w for w in plan.warnings)


def test_a_cache_over_its_limit(plan_of: PlanOf, folder_of: FolderOf) -> None:
    big = stage(more="    cache: {where: disk, limit_gib: 1e-4}\n")
    found = first_lines(plan_of, text(folder_of("llama"), convert("replace: [1]"), big))
    # 4 batches of 128 tokens, 2 sites of 64 float32 numbers: 262 144 bytes against 107 374.
    assert found == [
        "14:12: stages[0].cache: the teacher's features need 0.0 GiB for 4 batches, more than the limit of 0.0 GiB. "
        "Allow it (cache: {where: disk, limit_gib: 1}), draw batches: 1 at most, or turn the cache off."
    ]


def test_the_cache_of_a_stage_that_runs_end_to_end_holds_targets_alone(plan_of: PlanOf, folder_of: FolderOf) -> None:
    both = stage(inputs="student", tap="hidden", layers="layers: [{student: 0, teacher: 1}, {student: 1, teacher: 1}]")
    more = "    batches: 2\n    cache: memory\n    tokens: {divergence: forward_kl}\n"
    plan = plan_of(text(folder_of("llama"), convert("replace: [0, 1]"), both + more))
    # Two sites, though three objectives read them, of 64 float32 numbers a token; two batches of 128 tokens.
    assert plan.stages[0].cache_bytes == 2 * 64 * 4 * 2 * 128
    assert plan.warnings == ()
    off = plan_of(text(folder_of("llama"), convert("replace: [0, 1]"), both + more.replace("memory", "'off'")))
    assert off.stages[0].cache_bytes == 0 and off.stages[0].flops > plan.stages[0].flops


def test_an_explicit_pair_of_one_student_block_with_two_teacher_blocks(plan_of: PlanOf, folder_of: FolderOf) -> None:
    pairs = "layers: [{student: 1, teacher: 0}, {student: 1, teacher: 2}, {student: 2, teacher: 2}]"
    plan = plan_of(text(folder_of("llama"), convert("replace: [1, 2]"), stage(layers=pairs)))
    assert [pair.name for pair in plan.stages[0].pairs] == ["match.1-0", "match.1-2", "match.2"]
    assert [pair.weight for pair in plan.stages[0].pairs] == [0.5, 0.5, 1.0]


def test_a_teacher_that_does_not_convert_is_told_with_its_line(plan_of: PlanOf, folder_of: FolderOf) -> None:
    with pytest.raises(ConversionError) as caught:
        plan_of(text(folder_of("qwen3"), convert("keep_attention: every 2"), stage()))
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "map.yaml:3:20: student.convert: A teacher of type qwen3 cannot become granitemoehybrid or bamba" in message
    assert "fix:" in message


def test_a_model_that_is_not_there_is_told_with_its_line(plan_of: PlanOf) -> None:
    with pytest.raises(ModelError, match=r"map\.yaml:2:18: teacher\.model: .*no such"):
        plan_of(text("./no/such/folder/here", convert("replace: [1]"), stage()))


def test_an_unknown_family_asks_for_paths(plan_of: PlanOf, folder_of: FolderOf, tmp_path: Any) -> None:
    from transformers import BloomConfig

    folder = tmp_path / "bloom"
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97).save_pretrained(folder)
    content = text(str(folder), f"config: '{folder_of('mamba')}'", stage(train="all", layers="layers: same"))
    with pytest.raises(TapError, match=r"map\.yaml:2:10: teacher: [\s\S]*paths: \{blocks:"):
        plan_of(content)


def test_notices_about_models(plan_of: PlanOf, folder_of: FolderOf) -> None:
    teacher = folder_of("llama", max_position_embeddings=32)
    student = folder_of("llama", vocab_size=90, tie_word_embeddings=True)
    content = text(
        teacher,
        f"config: '{student}', dtype: bfloat16",
        "  - {name: one, steps: 1, train: [head], cache: memory, tokens: {weight: 1}}\n",
    )
    warnings = "\n".join(plan_of(content).warnings)
    assert "data.sequence_length is 64, but the teacher was made for at most 32 positions" in warnings
    assert "compared over the first 90" in warnings
    assert "the student's head is its embedding, so training head trains both" in warnings
    assert "stage one: every batch is drawn once, so the cache is never read" in warnings


def test_a_path_a_dict_and_an_object_give_the_same_plan(
    plan_of: PlanOf, folder_of: FolderOf, tmp_path: Path, rates: Rates
) -> None:
    from_file = plan_of(text(folder_of("llama"), convert("replace: [1]"), stage()))
    content = from_file.mapping.model_dump(mode="json", exclude_unset=True)
    for mapping in (str(tmp_path / "map.yaml"), tmp_path / "map.yaml", content, from_file.mapping):
        plan = make_plan(mapping, rates=rates)
        assert dataclasses.replace(plan, source="", path=None) == dataclasses.replace(from_file, source="", path=None)
        assert parse_mapping(plan.source)[0] == from_file.mapping


def test_a_dict_that_does_not_resolve_names_the_place(folder_of: FolderOf, rates: Rates) -> None:
    content = yaml.safe_load(text(folder_of("llama"), convert("replace: [1]"), stage()))
    content["stages"][0]["align"][0]["layers"] = [{"student": 0, "teacher": 0}, {"student": 1, "teacher": 99}]
    with pytest.raises(MappingFileError, match=r"^mapping: stages\[0\].align\[0\].layers(.|\n)*99"):
        make_plan(content, rates=rates)
    content["teacher"]["model"] = "./nowhere/at/all"
    with pytest.raises(ModelError, match=r"^teacher.model: There is no such model"):
        make_plan(content, rates=rates)


@pytest.mark.parametrize("mapping", [None, 3, b"map.yaml", [], "version: 1\nteacher: {model: a}\n", "\0", ""])
def test_what_is_no_mapping_is_an_error_of_the_package(mapping: Any) -> None:
    with pytest.raises(XarchError):
        make_plan(mapping)


@pytest.mark.parametrize("student", ["converted", "existing"])
def test_each_model_is_resolved_once_and_not_again_after_calibration(
    student: str, plan_of: PlanOf, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(convert_module, "teacher_spec")
    counted(convert_module, "choose_target")
    counted(load, "resolve")
    counted(AutoModelForCausalLM, "from_config")
    teacher = folder_of("llama", num_hidden_layers=4)
    source = convert("replace: [1]") if student == "converted" else f"model: '{folder_of('llama')}'"
    entry = stage(train="all", inputs="student", tap="hidden", layers="layers: cka")
    plan = plan_of(text(teacher, source, entry, entry.replace("name: one", "name: two")))
    if student == "converted":
        # The teacher's folder is looked at for its config, and for the names of its weights.
        assert sorted(calls) == ["choose_target", "from_config", "from_config", "resolve", "resolve", "teacher_spec"]
    else:
        assert sorted(calls) == ["from_config", "from_config", *["resolve"] * 4]
    calls.clear()
    shape = (len(plan.student.layers), 4)
    similarities = {entry_key(index, "match"): torch.eye(*shape).double() for index in (0, 1)}
    calibrated = calibrated_plan(plan, similarities)
    assert calls == []
    assert calibrated.uncalibrated == ()
    assert plan.uncalibrated == ((0, "match"), (1, "match"))
    assert [pair.teacher_layer for pair in calibrated.stages[1].pairs] == list(range(shape[0]))


@pytest.mark.parametrize(
    ("projector", "kind", "parameters"),
    [
        ("low_rank", "low_rank", 8 * (32 + 64)),
        ("{kind: low_rank, rank: 4, bias: true}", "low_rank", 4 * (32 + 64) + 64),
        ("{kind: mlp, hidden: 10}", "mlp", 10 * (32 + 1 + 64)),
        ("orthogonal", "orthogonal", 32 * 64),
        ("{kind: linear, bias: true}", "linear", 32 * 64 + 64),
    ],
)
def test_projectors_and_their_options(
    plan_of: PlanOf, folder_of: FolderOf, projector: str, kind: str, parameters: int
) -> None:
    teacher, student = folder_of("llama", num_hidden_layers=4), folder_of("llama", hidden_size=32, num_hidden_layers=2)
    entry = stage(inputs="student", train="all", tap="hidden", layers="layers: uniform")
    plan = plan_of(text(teacher, f"config: '{student}'", entry + f"        projector: {projector}\n"))
    assert {(pair.projector, pair.projector_parameters) for pair in plan.stages[0].pairs} == {(kind, parameters)}


def test_an_option_out_of_range_is_told_with_its_line(plan_of: PlanOf, folder_of: FolderOf) -> None:
    teacher, student = folder_of("llama", num_hidden_layers=4), folder_of("llama", hidden_size=32, num_hidden_layers=2)
    entry = stage(inputs="student", train="all", tap="hidden", layers="layers: uniform")
    content = text(teacher, f"config: '{student}'", entry + "        projector: {kind: low_rank, rank: 64}\n")
    (found,) = first_lines(plan_of, content)
    assert found.startswith("14:20: stages[0].align[0].projector: ")
