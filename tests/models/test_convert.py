from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from xarch_kd.errors import ConversionError, ModelError, UsageError
from xarch_kd.models.conversion.bamba import bamba_config
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.convert import NO_ATTENTION, convert, plan_conversion
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.loading.save import save_student
from xarch_kd.testing.tiny import LLAMA3, PARTIAL, VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {**PARTIAL, "rope_type": "longrope", "short_factor": [1.1] * 4, "long_factor": [2.0] * 4}

# Every supported kind of teacher, with True if the student's logits are bitwise equal.
TEACHERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, True),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}, True),
    "llama-yarn": ("llama", {"rope_parameters": YARN}, True),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, True),
    "llama-head-32": ("llama", {"head_dim": 32}, True),
    "llama-head-24": ("llama", {"head_dim": 24}, True),
    "llama-head-8": ("llama", {"head_dim": 8}, True),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}, True),
    "mistral": ("mistral", {}, True),
    "mistral-wide-window": ("mistral", {"sliding_window": 512}, True),
    "qwen2": ("qwen2", {}, True),
    "phi3": ("phi3", {}, True),
    "phi3-partial": ("phi3", {"rope_parameters": PARTIAL}, True),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, True),
    "granite": ("granite", {}, False),
    "granite-tied-biases": (
        "granite",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        False,
    ),
    "gemma": ("gemma", {}, True),
    "gemma-tied": ("gemma", {"tie_word_embeddings": True}, True),
}


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same(found: Tensor, expected: Tensor, *, exact: bool) -> None:
    """Bit for bit, or, where multipliers are folded into weights, within eight roundings of the largest value."""
    if exact:
        assert torch.equal(found, expected)
    else:
        bound = 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= bound


@pytest.fixture(params=TEACHERS)
def teacher_case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, bool]:
    """A tiny teacher, and True if the student's logits must be bitwise equal."""
    model_type, overrides, exact = TEACHERS[request.param]
    return tiny_model(model_type, **overrides), exact


@torch.no_grad()
def test_with_all_attention_kept_the_logits_are_the_teachers(teacher_case: tuple[PreTrainedModel, bool]) -> None:
    teacher, exact = teacher_case
    student = convert(teacher, keep_attention="all", target="bamba")
    assert type(student).__name__ == "BambaForCausalLM"
    assert_same(student(tokens()).logits, teacher(tokens()).logits, exact=exact)


@torch.no_grad()
def test_a_kept_block_maps_the_teachers_hidden_to_the_teachers_hidden(
    teacher_case: tuple[PreTrainedModel, bool],
) -> None:
    teacher, exact = teacher_case
    student = convert(teacher, replace=[1], target="bamba")
    assert student.config.layers_block_type == ["full_attention", "linear_attention", "full_attention"]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for index, block in enumerate(teacher.model.layers):
        block.register_forward_hook(lambda _, given, made, index=index: seen.update({index: (given[0], made)}) and None)
    teacher(tokens())
    positions = torch.arange(tokens().shape[1])[None]
    for index in (0, 2):
        hidden, expected = seen[index]
        rotary = student.model.rotary_emb(hidden, position_ids=positions)
        made, _ = student.model.layers[index](hidden, position_embeddings=rotary)
        assert_same(made, expected, exact=exact)


def test_a_replaced_block_keeps_its_mlp_and_norms() -> None:
    teacher = tiny_model("phi3")
    state = convert(teacher, replace=[1], target="bamba").state_dict()
    gate_up = teacher.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(state["model.layers.1.feed_forward.gate_proj.weight"], gate_up[:96])
    assert torch.equal(state["model.layers.1.feed_forward.up_proj.weight"], gate_up[96:])
    assert torch.equal(state["model.layers.1.input_layernorm.weight"], teacher.model.layers[1].input_layernorm.weight)


@pytest.mark.parametrize("name", ["llama-tied", "llama-head-24", "qwen2", "phi3-longrope", "granite"])
@torch.no_grad()
def test_saved_and_loaded_by_transformers_alone_the_student_is_the_same(name: str, tmp_path: Path) -> None:
    model_type, overrides, _ = TEACHERS[name]
    student = convert(tiny_model(model_type, **overrides), keep_attention=[0, 2], target="bamba")
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    loaded, report = both
    assert not any(report.values())
    assert type(loaded) is type(student)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    is_tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert is_tied is (name == "llama-tied")


@pytest.mark.parametrize("replaced", [[0], [1, 2]])
def test_generation_with_a_cache_gives_the_tokens_of_generation_without(replaced: list[int]) -> None:
    student: Any = convert(tiny_model("llama"), replace=replaced)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    cached = student.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, student.generate(prompt, attention_mask=mask, use_cache=False, **options))
    assert cached.shape == (2, 29)


def test_the_teacher_is_left_as_it_was_and_shares_nothing() -> None:
    teacher, untouched = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=True)
    student = convert(teacher, replace=[1])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in [*teacher.parameters(), *student.parameters()])
    assert not student.training


def test_the_config_that_the_plan_sees_is_the_students() -> None:
    teacher = tiny_model("granite")
    planned = plan_conversion(teacher.config, replace="every 2").config
    made = convert(teacher, replace="every 2").config
    ignored = ("dtype", "_attn_implementation_internal")
    assert {key: value for key, value in planned.to_dict().items() if key not in ignored} == {
        key: value for key, value in made.to_dict().items() if key not in ignored
    }


@torch.no_grad()
def test_a_bfloat16_teacher_gives_a_float32_student_of_the_same_weights() -> None:
    rounded = tiny_model("llama").bfloat16()
    student = convert(rounded, keep_attention="all")
    assert student.dtype == torch.float32
    # The rotary frequencies of a model cast as a whole are rounded too, so the float32 twin is built anew.
    twin = tiny_model("llama")
    twin.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    assert torch.equal(student(tokens()).logits, twin(tokens()).logits)
    assert convert(rounded, replace=[1], dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [[0, 1, 2], [3]])
@torch.no_grad()
def test_smollm3_keeps_blocks_that_agree_on_rotary_positions(keep: list[int]) -> None:
    teacher = tiny_model("smollm3")
    student = convert(teacher, keep_attention=keep, target="bamba")
    hidden, mask = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)), None
    positions = torch.arange(40)[None]
    for index in keep:
        expected = teacher.model.layers[index](
            hidden, position_embeddings=teacher.model.rotary_emb(hidden, positions), attention_mask=mask
        )
        rotary = student.model.rotary_emb(hidden, position_ids=positions)
        made, _ = student.model.layers[index](hidden, position_embeddings=rotary)
        assert torch.equal(made, expected)


def test_smollm3_with_mixed_kept_blocks_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"mix attention with and without(.|\n)*blocks without .*: \[3\]"):
        plan_conversion(tiny_config("smollm3"), keep_attention=[2, 3])


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("rope_parameters", {**PARTIAL}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}),
        ("rms_norm_eps", 1e-2),
        ("hidden_act", "gelu"),
    ],
)
def test_a_field_that_is_dropped_without_a_word_is_found(
    monkeypatch: pytest.MonkeyPatch, field: str, wrong: object
) -> None:
    def dropping(*arguments: Any) -> Any:
        config = bamba_config(*arguments)
        setattr(config, field, wrong)
        return config

    monkeypatch.setitem(TARGETS, "bamba", replace(TARGETS["bamba"], config=dropping))
    with pytest.raises(ConversionError, match=r"not exact(.|\n)*largest difference"):
        convert(tiny_model("llama"), keep_attention=[0, 2], target="bamba")


def test_a_multiplier_that_is_not_folded_is_found() -> None:
    teacher = tiny_model("granite")
    teacher.model.layers[2].residual_multiplier = 0.61
    with pytest.raises(ConversionError, match="not exact"):
        convert(teacher, keep_attention=[0])


def test_the_check_returns_a_difference_far_below_its_tolerance() -> None:
    teacher = tiny_model("granite")
    difference = plan_conversion(teacher.config, target="bamba", keep_attention=[0]).check(teacher)
    assert 0.0 < difference < 0.1 * logits_tolerance(2.0, 3, torch.float32)


def test_a_conversion_that_was_planned_for_another_teacher_is_refused() -> None:
    planned = plan_conversion(tiny_config("llama"), replace=[1])
    assert planned.build(tiny_model("llama"), check=False).config.model_type == "granitemoehybrid"
    with pytest.raises(ConversionError, match=r"planned for another teacher(.|\n)*rms_norm_eps: 0.01"):
        planned.build(tiny_model("llama", rms_norm_eps=0.01), check=False)


def test_weights_without_a_place_in_the_student_are_refused() -> None:
    teacher = tiny_model("llama")
    teacher.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConversionError, match=r"no place for(.|\n)*layers.0.extra"):
        convert(teacher, replace=[1], check=False)


def test_weights_that_are_not_finite_are_refused() -> None:
    teacher = tiny_model("llama")
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"teacher holds NaN(.|\n)*layers\.0\.mlp\.up_proj\.weight"):
        convert(teacher, replace=[1])


REFUSED = {
    "gemma2": "soft-capped",
    "gemma3_text": "two rotary bases",
    "gpt2": "learned positions",
    "gpt_neox": "in parallel",
    "mamba": "not known to be exact",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_teacher_that_no_class_holds_is_refused_with_the_reason_and_what_works(model_type: str) -> None:
    with pytest.raises(ConversionError, match=rf"{REFUSED[model_type]}(.|\n)*fix: .*fresh student"):
        plan_conversion(tiny_config(model_type), keep_attention=[0])


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("mistral", {"sliding_window": 8}),
        ("phi3", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_a_sliding_window_in_use_is_refused(model_type: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=r"sliding window of 8 tokens(.|\n)*set sliding_window to null"):
        plan_conversion(tiny_config(model_type, **overrides), keep_attention=[0])


def test_refuses_names_and_blocks_that_do_not_exist() -> None:
    teacher = tiny_model("llama")
    with pytest.raises(ConversionError, match="no conversion to this mixer"):
        convert(teacher, mixer="rwkv", keep_attention=[0])
    with pytest.raises(ConversionError, match="no conversion to this class"):
        convert(teacher, target="jamba", keep_attention=[0])
    with pytest.raises(UsageError, match="names block 3, but the model has 3 blocks"):
        convert(teacher, keep_attention=[3])


def test_no_attention_left_warns_and_still_runs_without_a_cache() -> None:
    teacher = tiny_model("llama")
    with pytest.warns(UserWarning, match="generation with a cache fails"):
        student = convert(teacher, keep_attention="none")
    assert student(tokens(), use_cache=False).logits.isfinite().all()
    assert plan_conversion(teacher.config, keep_attention="none").warnings == (NO_ATTENTION,)


def test_warnings_say_what_a_conversion_costs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        granite = tiny_config("granite", tie_word_embeddings=True)
        (untied,) = plan_conversion(granite, replace=[1], target="bamba").warnings
        (activation,) = plan_conversion(tiny_config("gemma"), replace=[1]).warnings
        (same,) = plan_conversion(tiny_config("llama"), keep_attention="all").warnings
    assert f"{97 * 64:,} more parameters" in untied
    assert "gelu" in activation
    assert "another class" in same
    assert plan_conversion(tiny_config("llama"), replace=[1]).warnings == ()
