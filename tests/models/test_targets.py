"""Every stock class that a teacher can be converted to, except Bamba (`test_convert.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from xarch_kd.errors import ConversionError, UsageError
from xarch_kd.models.conversion.check import logits_tolerance
from xarch_kd.models.conversion.convert import convert, plan_conversion
from xarch_kd.models.conversion.frozen_parameters import frozen_parameters
from xarch_kd.models.conversion.targets import TARGETS
from xarch_kd.models.conversion.teacher_spec import teacher_spec
from xarch_kd.models.loading.save import save_student
from xarch_kd.testing.tiny import LLAMA3, PARTIAL, VOCABULARY, tiny_config, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Case:
    """A teacher and its target class; `exact` if the student's logits are bitwise equal."""

    model_type: str
    target: str
    exact: bool = True
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def mixer(self) -> str:
        return TARGETS[self.target].mixer

    def teacher(self) -> PreTrainedModel:
        return tiny_model(self.model_type, **self.overrides)

    def convert(self, **options: Any) -> PreTrainedModel:
        return convert(self.teacher(), mixer=self.mixer, target=self.target, **options)


CASES = {
    "granite": Case("granite", "granitemoehybrid"),
    "granite-tied": Case("granite", "granitemoehybrid", True, {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-llama3": Case("llama", "granitemoehybrid", True, {"rope_parameters": LLAMA3}),
    "llama-head-32": Case("llama", "granitemoehybrid", True, {"head_dim": 32}),
    "qwen2-granite": Case("qwen2", "granitemoehybrid"),
    "gemma-granite": Case("gemma", "granitemoehybrid", True, {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", "qwen3_5"),
    "qwen3-tied": Case("qwen3", "qwen3_5", True, {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-head-32": Case("qwen3", "qwen3_5", True, {"head_dim": 32, "num_key_value_heads": 1}),
    "llama": Case("llama", "qwen3_5", False),
    "llama-biases": Case("llama", "qwen3_5", False, {"attention_bias": True}),
    "llama-head-24": Case("llama", "qwen3_5", False, {"head_dim": 24}),
    "qwen2": Case("qwen2", "qwen3_5", False),
    "phi3-partial": Case("phi3", "qwen3_5", False, {"rope_parameters": PARTIAL}),
    "granite-delta": Case("granite", "qwen3_5", False),
    "gemma-delta": Case("gemma", "qwen3_5", False),
    "olmo2": Case("olmo2", "olmo_hybrid"),
    "olmo2-tied": Case("olmo2", "olmo_hybrid", True, {"tie_word_embeddings": True, "attention_bias": True}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A teacher and its target class."""
    return CASES[request.param]


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same(found: Tensor, expected: Tensor, *, exact: bool) -> None:
    """Bit for bit, or within what rounding makes of a hidden state or logits of a model of three blocks."""
    if exact:
        assert torch.equal(found, expected)
    else:
        bound = logits_tolerance(float(expected.abs().max()), 3, expected.dtype)
        assert 0.0 < float((found - expected).abs().max()) <= bound


@torch.no_grad()
def test_with_all_attention_kept_the_logits_are_the_teachers(case: Case) -> None:
    teacher = case.teacher()
    student = case.convert(keep_attention="all")
    assert student.config.model_type.removesuffix("_text") == case.target
    assert_same(student(tokens()).logits, teacher(tokens()).logits, exact=case.exact)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    padded, expected = student(tokens(), attention_mask=mask).logits, teacher(tokens(), attention_mask=mask).logits
    assert_same(padded[1, 7:], expected[1, 7:], exact=case.exact)


@torch.no_grad()
def test_a_kept_block_maps_the_teachers_hidden_to_the_teachers_hidden(case: Case) -> None:
    teacher, student = case.teacher(), case.convert(replace=[1])
    kinds = student.config.layer_types
    assert list(kinds) == ["full_attention", "linear_attention", "full_attention"]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for index, block in enumerate(teacher.model.layers):
        block.register_forward_hook(lambda _, given, made, index=index: seen.update({index: (given[0], made)}) and None)
    teacher(tokens())
    positions = torch.arange(tokens().shape[1])[None]
    for index in (0, 2):
        hidden, expected = seen[index]
        rotary = student.model.rotary_emb(hidden, position_ids=positions)
        made = student.model.layers[index](hidden, position_embeddings=rotary)
        assert_same(made[0] if isinstance(made, tuple) else made, expected, exact=case.exact)


@pytest.mark.parametrize("name", ["granite-tied", "llama-head-32", "qwen3-tied", "llama-head-24", "olmo2"])
@torch.no_grad()
def test_saved_and_loaded_by_transformers_alone_the_student_is_the_same(name: str, tmp_path: Path) -> None:
    student = CASES[name].convert(keep_attention=[0, 2])
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    loaded, report = both
    assert not any(report.values())
    assert type(loaded) is type(student)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    is_tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert is_tied is ("tied" in name)
    assert frozen_parameters(loaded) == frozen_parameters(student)


@pytest.mark.parametrize("name", ["granite", "qwen3", "llama", "olmo2"])
def test_generation_with_a_cache_gives_the_tokens_of_generation_without(name: str) -> None:
    student: Any = CASES[name].convert(replace=[0, 1])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    cached = student.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, student.generate(prompt, attention_mask=mask, use_cache=False, **options))
    assert cached.shape == (2, 21)


@pytest.mark.parametrize("name", ["granite", "qwen3"])
def test_without_attention_a_cache_is_refused_by_the_class_and_the_conversion_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="generation with a cache fails"):
        student: Any = CASES[name].convert(keep_attention="none")
    assert student(tokens(), use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match="get_seq_length"):
        student.generate(tokens(1, 5), max_new_tokens=2, use_cache=True, pad_token_id=0)


def test_olmo_hybrid_demands_blocks_of_both_kinds() -> None:
    teacher = tiny_config("olmo2")
    with pytest.raises(ConversionError, match=r"at least one block with attention(.|\n)*last 1"):
        plan_conversion(teacher, mixer="gated_delta", keep_attention="none")
    kept = plan_conversion(teacher, mixer="gated_delta", keep_attention="all").config
    assert kept.to_dict()["layer_types"] == ["full_attention"] * 3 + ["linear_attention"]
    assert any("one that adds nothing" in told for told in warned(teacher, keep_attention="all"))
    assert any("norms precede" in told for told in warned(teacher, replace=[1]))


def warned(teacher: Any, **options: Any) -> tuple[str, ...]:
    return plan_conversion(teacher, mixer="gated_delta", **options).warnings


def test_an_olmo_block_that_is_replaced_keeps_its_mlp_near_the_teachers() -> None:
    teacher, student = tiny_model("olmo2"), CASES["olmo2"].convert(replace=[1])
    block, made = teacher.model.layers[1], student.model.layers[1]
    hidden = torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # As large as what a block's MLP usually reads: that is the weight of the norm that now precedes it.
        hidden = hidden * made.post_attention_layernorm.weight
        expected = block.post_feedforward_layernorm(block.mlp(hidden))
        found = made.mlp(made.post_attention_layernorm(hidden))
    cosine = torch.cosine_similarity(found, expected, dim=-1)
    # A token's direction is the teacher's up to what its norm's input differs in size; only its length is another.
    assert float(cosine.min()) > 0.95
    assert 0.5 < float(found.norm() / expected.norm()) < 2.0


@pytest.mark.parametrize(
    ("model_type", "overrides", "mixer", "expected"),
    [
        ("llama", {}, "mamba2", "granitemoehybrid"),
        ("qwen2", {}, "mamba2", "granitemoehybrid"),
        ("mistral", {}, "mamba2", "granitemoehybrid"),
        ("phi3", {}, "mamba2", "granitemoehybrid"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "mamba2", "granitemoehybrid"),
        ("gemma", {}, "mamba2", "granitemoehybrid"),
        ("llama", {"mlp_bias": True}, "mamba2", "bamba"),
        ("granite", {}, "mamba2", "granitemoehybrid"),
        ("phi3", {"rope_parameters": PARTIAL}, "mamba2", "bamba"),
        ("granite", {"mlp_bias": True}, "mamba2", "bamba"),
        ("qwen3", {}, "gated_delta", "qwen3_5_text"),
        ("llama", {}, "gated_delta", "qwen3_5_text"),
        ("olmo2", {}, "gated_delta", "olmo_hybrid"),
    ],
)
def test_auto_is_the_class_that_fits_best(
    model_type: str, overrides: dict[str, Any], mixer: str, expected: str
) -> None:
    config = plan_conversion(tiny_config(model_type, **overrides), mixer=mixer, replace=[1]).config
    assert config.model_type == expected


@pytest.mark.parametrize(
    ("model_type", "overrides", "mixer", "target", "reason", "instead"),
    [
        ("qwen3", {}, "mamba2", "auto", "query and key norms are not linear", "target: qwen3_5"),
        ("olmo2", {}, "mamba2", "auto", "norms follow", "target: olmo_hybrid"),
        ("qwen3", {}, "gated_delta", "olmo_hybrid", "norms precede", "target: qwen3_5"),
        ("olmo2", {}, "gated_delta", "qwen3_5", "norms follow", "target: olmo_hybrid"),
        ("llama", {"mlp_bias": True}, "gated_delta", "auto", "MLP has biases", "target: bamba"),
        ("llama", {"mlp_bias": True}, "mamba2", "granitemoehybrid", "MLP has biases", "target: bamba"),
        ("phi3", {"rope_parameters": PARTIAL}, "mamba2", "granitemoehybrid", "part of each head", "target: bamba"),
    ],
)
def test_a_class_that_cannot_hold_a_teacher_says_why_and_what_can(
    model_type: str, overrides: dict[str, Any], mixer: str, target: str, reason: str, instead: str
) -> None:
    config = tiny_config(model_type, **overrides)
    with pytest.raises(ConversionError, match=rf"cannot become(.|\n)*{reason}(.|\n)*fix: .*{instead}(.|\n)*fresh"):
        plan_conversion(config, mixer=mixer, target=target, replace=[1])


def test_names_that_do_not_go_together_and_blocks_that_do_not_exist() -> None:
    config = tiny_config("llama")
    with pytest.raises(ConversionError, match=r"qwen3_5 has no mixers of this kind(.|\n)*mixer: gated_delta"):
        plan_conversion(config, mixer="mamba2", target="qwen3_5", replace=[1])
    with pytest.raises(ConversionError, match=r"no conversion to this class(.|\n)*auto, granitemoehybrid, bamba"):
        plan_conversion(config, target="jamba", replace=[1])
    with pytest.raises(UsageError, match="names block 3, but the model has 3 blocks"):
        plan_conversion(config, mixer="gated_delta", keep_attention=[3])


def test_a_sliding_window_of_qwen3_is_refused() -> None:
    config = tiny_config("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ConversionError, match="sliding window of 8 tokens"):
        plan_conversion(config, mixer="gated_delta", replace=[1])


@pytest.mark.parametrize("target", ["granitemoehybrid", "qwen3_5"])
@pytest.mark.parametrize("keep", [[0, 1], [3]])
@torch.no_grad()
def test_smollm3_keeps_blocks_that_agree_on_rotary_positions(keep: list[int], target: str) -> None:
    teacher = tiny_model("smollm3")
    student = convert(teacher, mixer=TARGETS[target].mixer, target=target, keep_attention=keep)
    hidden = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)[None]
    for index in keep:
        rotary = teacher.model.rotary_emb(hidden, positions)
        expected = teacher.model.layers[index](hidden, position_embeddings=rotary, attention_mask=None)
        own = student.model.rotary_emb
        made = student.model.layers[index](
            hidden, position_embeddings=None if own is None else own(hidden, position_ids=positions)
        )
        assert_same(made[0] if isinstance(made, tuple) else made, expected, exact=target == "granitemoehybrid")


def test_heads_of_mixers_are_those_of_queries_and_shared_ones_are_repeated() -> None:
    config = plan_conversion(tiny_config("qwen3", num_key_value_heads=1), mixer="gated_delta", replace=[1]).config
    sizes = config.to_dict()
    assert sizes["linear_num_key_heads"] == sizes["linear_num_value_heads"] == 4
    student = convert(tiny_model("qwen3", num_key_value_heads=1), mixer="gated_delta", replace=[1])
    keys = student.model.layers[1].linear_attn.in_proj_qkv.weight[64:128].view(4, 16, 64)
    assert torch.equal(keys[0], keys[3])


def drop(name: str, wrong: object) -> Callable[[Any], Any]:
    """A change of a config: one field that a class would silently take from its own defaults."""

    def dropped(config: Any) -> Any:
        setattr(config, name, wrong)
        return config

    return dropped


def spoil(ending: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A change of a state: the weights whose names end so."""
    return lambda state: {name: change(value) if name.endswith(ending) else value for name, value in state.items()}


FULL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("granite", "config", drop("attention_multiplier", 1.0)),
        ("llama-head-32", "config", drop("attention_multiplier", 1.0)),
        ("granite", "config", drop("embedding_multiplier", 1.0)),
        ("granite", "config", drop("residual_multiplier", 1.0)),
        ("granite", "config", drop("logits_scaling", 1.0)),
        ("granite", "config", drop("position_embedding_type", None)),
        ("qwen3", "config", drop("rope_parameters", {**FULL, "partial_rotary_factor": 0.25})),
        ("phi3-partial", "config", drop("rope_parameters", FULL)),
        ("llama", "config", drop("rms_norm_eps", 1e-4)),
        ("qwen3", "state", spoil("input_layernorm.weight", lambda weight: weight + 1.0)),
        ("qwen3", "state", spoil("model.norm.weight", lambda weight: weight + 1.0)),
        ("qwen3", "state", spoil("k_norm.weight", lambda weight: weight + 1.0)),
        ("qwen3", "state", spoil("o_proj.weight", lambda weight: weight / 2)),
        ("qwen3", "state", spoil("q_proj.weight", lambda weight: weight.view(4, 2, 16, 64).flip(1).reshape(128, 64))),
        ("llama", "state", spoil("q_norm.weight", torch.zeros_like)),
        ("olmo2", "config", drop("rope_parameters", None)),
        ("olmo2", "state", spoil("q_norm.weight", torch.ones_like)),
    ],
)
def test_what_a_class_drops_without_a_word_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, part: str, change: Callable[[Any], Any]
) -> None:
    case = CASES[name]
    made: Any = getattr(TARGETS[case.target], part)
    changed: dict[str, Any] = {part: lambda *arguments: change(made(*arguments))}
    monkeypatch.setitem(TARGETS, case.target, replace(TARGETS[case.target], **changed))
    with pytest.raises(ConversionError, match=r"not exact(.|\n)*largest difference"):
        case.convert(keep_attention=[0, 2])


def test_a_partial_rotation_that_granitemoehybrid_ignores_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = replace(TARGETS["granitemoehybrid"], unsupported_reason=lambda spec: None)
    monkeypatch.setitem(TARGETS, "granitemoehybrid", blind)
    with pytest.raises(ConversionError, match="not exact"):
        convert(tiny_model("phi3", rope_parameters=PARTIAL), target="granitemoehybrid", replace=[1])


@torch.no_grad()
def test_norms_of_a_bfloat16_teacher_are_not_rounded_anew() -> None:
    rounded = tiny_model("qwen3").bfloat16()
    student = convert(rounded, mixer="gated_delta", keep_attention="all")
    twin = tiny_model("qwen3")
    twin.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    assert torch.equal(student(tokens()).logits, twin(tokens()).logits)


def test_an_exact_student_has_nothing_frozen() -> None:
    for name in ("qwen3", "granite", "olmo2"):
        student = CASES[name].convert(replace=[1])
        assert frozen_parameters(student) == ()
        assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_what_must_stay_frozen_is_known_from_the_plan_and_from_the_student(name: str) -> None:
    case = CASES[name]
    student = case.convert(keep_attention=[0, 2])
    planned = plan_conversion(case.teacher().config, mixer=case.mixer, keep_attention=[0, 2]).frozen
    assert set(frozen_parameters(student)) == set(planned)
    assert {name for name, parameter in student.named_parameters() if not parameter.requires_grad} == set(planned)
    assert len(planned) == 2 * (6 if case.overrides else 4)
    assert any("stay frozen" in told for told in warned(case.teacher().config, keep_attention=[0, 2]))


def test_one_step_on_what_must_stay_frozen_destroys_the_student_and_one_on_the_rest_does_not() -> None:
    moved: dict[bool, float] = {}
    for thaws in (False, True):
        student = CASES["llama"].convert(keep_attention="all").requires_grad_(thaws)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(thaws or name not in frozen_parameters(student))
        before = student(tokens()).logits.detach()
        optimizer = torch.optim.AdamW([one for one in student.parameters() if one.requires_grad], lr=1e-4)
        student(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        moved[thaws] = float((student(tokens()).logits.detach() - before).abs().max())
    assert moved[False] < 0.2 * moved[True]


def test_a_fold_is_told_only_where_the_class_has_no_multipliers() -> None:
    config = tiny_config("granite", tie_word_embeddings=True)
    assert plan_conversion(config, replace=[1]).warnings == ()
    assert plan_conversion(config, replace=[1]).config.tie_word_embeddings
    assert teacher_spec(config).is_folded


@pytest.mark.parametrize(
    ("model_type", "overrides", "mixer"),
    [("gemma2", {}, "mamba2"), ("gpt2", {}, "gated_delta"), ("mistral", {"sliding_window": 8}, "mamba2")],
)
def test_in_place_is_offered_where_no_class_fits_and_converts(
    model_type: str, overrides: dict[str, Any], mixer: str
) -> None:
    teacher = tiny_model(model_type, **overrides)
    with pytest.raises(ConversionError, match=r"fix: .*target: in_place"):
        convert(teacher, mixer=mixer, keep_attention=[0])
    student = convert(teacher, mixer=mixer, target="in_place", keep_attention=[0])
    assert student.config.replaced_layers == [1, 2]
    planned = plan_conversion(teacher.config, mixer=mixer, target="in_place", replace=[1, 2]).config
    assert planned.to_dict()["replaced_layers"] == [1, 2] and planned.model_type == student.config.model_type
    (told,) = plan_conversion(teacher.config, mixer=mixer, target="in_place", replace=[1, 2]).warnings
    assert "install this package" in told
    assert len(plan_conversion(teacher.config, target="in_place", keep_attention="none").warnings) == 2
    assert plan_conversion(teacher.config, target="in_place", replace=[1]).frozen == ()


def test_in_place_is_not_offered_where_it_does_not_exist() -> None:
    config = tiny_config("phi3", sliding_window=8)
    with pytest.raises(ConversionError) as caught:
        plan_conversion(config, replace=[1])
    assert "in_place" not in str(caught.value)
    with pytest.raises(ConversionError, match=r"mix attention with and without(.|\n)*fix: .*in_place"):
        plan_conversion(tiny_config("smollm3"), keep_attention=[2, 3])


def test_a_mixer_under_multipliers_reads_scaled_queries_and_returns_what_the_class_scales() -> None:
    teacher = tiny_model("granite")
    own = convert(teacher, target="granitemoehybrid", replace=[1]).model.layers[1].mamba
    folded = convert(teacher, target="bamba", replace=[1]).model.layers[1].mamba
    torch.testing.assert_close(own.in_proj.weight, folded.in_proj.weight)
    torch.testing.assert_close(0.6 * own.out_proj.weight, folded.out_proj.weight)
