from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from xarch_kd.errors import ConversionError, UsageError
from xarch_kd.models.conversion.convert import convert, plan_conversion
from xarch_kd.models.in_place import convert as in_place_convert
from xarch_kd.models.in_place.classes import CLASSES
from xarch_kd.models.in_place.convert import ALL_RECURRENT
from xarch_kd.models.in_place.registration import register_when_loaded
from xarch_kd.models.loading.load import fresh_model, meta_model
from xarch_kd.models.loading.save import save_student
from xarch_kd.testing.tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

# Every family of the table, with what makes it one that no stock class holds.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 20}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-head-32": ("qwen3", {"head_dim": 32}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "smollm3": ("smollm3", {}),
    "smollm3-head-32": ("smollm3", {"head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
}
MIXERS = ("mamba2", "gated_delta")


def teacher_named(name: str) -> PreTrainedModel:
    model_type, overrides = TEACHERS[name]
    return tiny_model(model_type, **overrides)


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def padded_mask(rows: int, length: int, padding: int) -> Tensor:
    """The first row has `padding` tokens less, on the left."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_with_all_attention_kept_the_logits_are_the_teachers_bit_for_bit(name: str) -> None:
    teacher = teacher_named(name)
    student = convert(teacher, replace=(), target="in_place")
    assert isinstance(student, type(teacher))
    assert torch.equal(student(tokens()).logits, teacher(tokens()).logits)
    mask = padded_mask(2, 40, 7)
    expected = teacher(tokens(), attention_mask=mask).logits
    assert torch.equal(student(tokens(), attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3-window", "mistral-window", "smollm3", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_a_kept_block_maps_the_teachers_hidden_to_the_teachers_hidden(name: str, mixer: str) -> None:
    # Block 0 is replaced; every later block of the student is then fed what the teacher's was.
    teacher = teacher_named(name)
    student = convert(teacher, replace=[0], mixer=mixer, target="in_place")
    given, expected = blocks_seen(teacher, {})
    _, made = blocks_seen(student, given)
    assert not torch.equal(made[0], expected[0])
    assert all(torch.equal(made[index], expected[index]) for index in range(1, len(expected)))


def blocks_seen(model: PreTrainedModel, feed: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Inputs and outputs of the blocks; `feed` replaces a block's input."""
    layers: Any = getattr(model.base_model, "h", None) or model.base_model.layers
    given: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}

    def before(index: int) -> Any:
        def replace(_: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
            given[index] = feed[index] if index in feed else args[0]
            return (given[index], *args[1:])

        return replace

    def after(index: int) -> Any:
        return lambda _, args, output: made.update({index: output})

    handles = [layer.register_forward_pre_hook(before(index)) for index, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(after(index)) for index, layer in enumerate(layers)]
    model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return given, made


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2-tied", "gemma3", "qwen3-head-32", "mistral-window", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_saved_and_loaded_the_student_is_the_same(name: str, mixer: str, tmp_path: Path) -> None:
    student = convert(teacher_named(name), replace=[0, 2], mixer=mixer, target="in_place")
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    loaded, report = both
    assert not any(report.values())
    assert type(loaded) is type(student)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    assert loaded.config.to_diff_dict() == student.config.to_diff_dict()
    head: Any = loaded.get_output_embeddings()
    is_tied = head.weight is loaded.get_input_embeddings().weight
    assert is_tied is (name in ("gemma2-tied", "gpt2"))
    assert "import xarch_kd" in json.loads((tmp_path / "student" / "config.json").read_text())["needs"]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3", "smollm3", "mistral-window", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("replaced", [[0], [1, 2]])
def test_generation_with_a_cache_gives_the_tokens_of_generation_without(
    name: str, mixer: str, replaced: list[int]
) -> None:
    student: Any = convert(teacher_named(name), replace=replaced, mixer=mixer, check=False, target="in_place")
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, mask = tokens(2, 9), padded_mask(2, 9, 3)
    cached = student.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, student.generate(prompt, attention_mask=mask, use_cache=False, **options))
    alone = student.generate(prompt[:1, 3:], attention_mask=mask[:1, 3:], use_cache=True, **options)
    assert torch.equal(cached[:1, 3:], alone)
    assert len({tuple(row.tolist()) for row in cached[:, 9:]}) == 2


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_logits_token_by_token_and_after_padding_are_those_of_the_whole(name: str, mixer: str) -> None:
    student: Any = convert(teacher_named(name), replace=[1], mixer=mixer, check=False, target="in_place")
    whole = student(tokens(1, 24), use_cache=False).logits
    # The recurrence step by step sums in another order than in chunks; a state that is lost moves logits by their size.
    bound = 1e-4 * float(whole.abs().max())
    first = student(tokens(1, 24)[:, :11], use_cache=True)
    pieces, cache = [first.logits], first.past_key_values
    for start, stop in [(11, 17), *((index, index + 1) for index in range(17, 24))]:
        step = student(tokens(1, 24)[:, start:stop], past_key_values=cache, use_cache=True)
        pieces.append(step.logits)
    assert float((torch.cat(pieces, dim=1) - whole).abs().max()) <= bound
    padded = torch.cat([tokens(1, 5), tokens(1, 24)], dim=1)
    mask = padded_mask(1, 29, 5)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = student(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 5:]
    assert float((found - whole).abs().max()) <= bound


@pytest.mark.parametrize("name", ["gemma2", "mistral-window"])
def test_a_static_cache_generates_the_same(name: str) -> None:
    student: Any = convert(teacher_named(name), replace=[1], check=False, target="in_place")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": padded_mask(2, 9, 3), "disable_compile": True}
    expected = student.generate(tokens(2, 9), **options)
    assert torch.equal(student.generate(tokens(2, 9), cache_implementation="static", **options), expected)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt_neox", "mistral-window"])
def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(name: str, mixer: str) -> None:
    student = convert(teacher_named(name), replace=[0, 2], mixer=mixer, check=False, target="in_place").train()
    mask = padded_mask(2, 24, 5)

    def gradients() -> dict[str, Tensor]:
        student.zero_grad()
        student(tokens(2, 24), attention_mask=mask, labels=tokens(2, 24), use_cache=False).loss.backward()
        return {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}

    plain = gradients()
    assert plain.keys() == {name for name, _ in student.named_parameters()}
    student.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_the_teacher_is_left_as_it_was_and_shares_nothing() -> None:
    teacher, untouched = teacher_named("gemma2-tied"), teacher_named("gemma2-tied")
    student = convert(teacher, replace=[1], mixer="gated_delta", target="in_place")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.to_dict() == untouched.config.to_dict()
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2"])
def test_the_config_that_a_plan_sees_is_the_students(name: str, mixer: str) -> None:
    teacher = teacher_named(name)
    planned = plan_conversion(teacher.config, replace="every 2", mixer=mixer, target="in_place").config
    student = convert(teacher, replace="every 2", mixer=mixer, target="in_place")
    assert {**planned.to_dict(), "dtype": None} == {**student.config.to_dict(), "dtype": None}
    assert {key: value.shape for key, value in meta_model(planned).state_dict().items()} == {
        key: value.shape for key, value in student.state_dict().items()
    }


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_fresh_student_starts_with_the_mixers_own_weights(name: str, mixer: str) -> None:
    model_type, overrides = TEACHERS[name]
    config = plan_conversion(tiny_config(model_type, **overrides), replace=[1], mixer=mixer, target="in_place").config
    student = fresh_model(config, seed=0)
    blocks: Any = getattr(student.base_model, "h", None) or student.base_model.layers
    mixer_module = blocks[1].attn if name == "gpt2" else blocks[1].self_attn
    assert torch.equal(mixer_module.norm.weight, torch.ones_like(mixer_module.norm.weight))
    assert torch.equal(mixer_module.dt_bias, torch.ones(4))
    assert bool((mixer_module.A_log <= torch.log(torch.tensor(16.0))).all())
    assert student(tokens()).logits.isfinite().all()
    if name == "gemma2":
        assert not blocks[1].input_layernorm.weight.any()


def test_random_mixers_follow_the_seed() -> None:
    def made(seed: int, mixer: str) -> Tensor:
        options: dict[str, Any] = {"init": "random", "check": False}
        student = convert(tiny_model("gemma2"), replace=[1, 2], mixer=mixer, seed=seed, **options, target="in_place")
        return torch.stack([student.get_parameter(f"model.layers.{index}.self_attn.conv1d.weight") for index in (1, 2)])

    for mixer in MIXERS:
        assert torch.equal(made(0, mixer), made(0, mixer))
        assert not torch.equal(made(0, mixer)[0], made(1, mixer)[0])
        assert not torch.equal(made(0, mixer)[0], made(0, mixer)[1])


def test_the_classes_are_registered_and_can_be_pickled() -> None:
    student = convert(tiny_model("gemma2"), replace=[1], target="in_place")
    assert type(AutoConfig.for_model("xarch_kd_gemma2")) is CLASSES["gemma2"].config
    assert type(AutoModel.from_config(student.config)) is CLASSES["gemma2"].base
    again = pickle.loads(pickle.dumps(student))
    assert torch.equal(again(tokens()).logits, student(tokens()).logits)
    assert torch.equal(copy.deepcopy(student)(tokens()).logits, student(tokens()).logits)


# What is run first in a process that has not loaded transformers, and what it is.
FIRST: dict[str, str] = {
    "a module": "from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention",
    "trainer": "from transformers import Trainer",
    "automatic classes": """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(saved)
assert type(model).__name__ == "InPlaceGPT2LMHeadModel"
assert finders() == []
import inspect, transformers.models.auto.modeling_auto as auto
assert "AutoModelForCausalLM" in inspect.getsource(auto)
raise SystemExit
""",
}


def test_a_fresh_interpreter_knows_it_whatever_it_loads_of_transformers_and_loads_nothing_before(
    tmp_path: Path,
) -> None:
    convert(tiny_model("gpt2"), replace=[1], target="in_place").save_pretrained(tmp_path)
    # One process loads torch, and what transformers loads of others; each of its children is as one that has not
    # loaded transformers.
    code = f"""
import os, sys
from xarch_kd.models.in_place.registration import register_when_loaded
saved = {str(tmp_path)!r}
register_when_loaded()
register_when_loaded()
assert not {{"torch", "transformers"}} & sys.modules.keys()
def finders():
    return [finder for finder in sys.meta_path if type(finder).__module__ == "xarch_kd.models.in_place.registration"]
assert len(finders()) == 1
import accelerate, safetensors.torch, scipy.optimize, tokenizers, torch, torch._dynamo
import torch.distributed.fsdp, torch.distributed.tensor
from huggingface_hub import HfApi
assert "transformers" not in sys.modules
for name, statement in {FIRST!r}.items():
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
        continue
    exec(statement)
    from transformers import AutoConfig, AutoModelForCausalLM
    assert "transformers.models.gpt2.modeling_gpt2" not in sys.modules
    config = AutoConfig.for_model("xarch_kd_gpt2", n_layer=2, n_embd=16, n_head=2, vocab_size=32, replaced_layers=[0],
        mixer_settings=dict(mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2))
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "InPlaceGPT2LMHeadModel"
    break
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_registering_late_is_registering_at_once() -> None:
    finders = list(sys.meta_path)
    register_when_loaded()
    assert sys.meta_path == finders
    assert type(AutoConfig.for_model("xarch_kd_gpt2")) is CLASSES["gpt2"].config


def test_no_attention_left_warns_and_still_runs_without_a_cache() -> None:
    with pytest.warns(UserWarning, match="generates only with use_cache=False"):
        student = convert(tiny_model("gemma2"), replace="all", target="in_place")
    assert student(tokens(), use_cache=False).logits.isfinite().all()
    assert "use_cache=False" in ALL_RECURRENT


def test_a_field_that_is_dropped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = in_place_convert._student_config

    def dropping(*arguments: Any) -> Any:
        config: Any = honest(*arguments)
        config.attn_logit_softcapping = None
        return config

    teacher = tiny_model("gemma2")
    assert plan_conversion(teacher.config, replace=[0], target="in_place").check(teacher) == 0.0
    monkeypatch.setattr(in_place_convert, "_student_config", dropping)
    with pytest.raises(ConversionError, match=r"not exact(.|\n)*largest difference"):
        convert(tiny_model("gemma2"), replace=[0], target="in_place")


REFUSED = {
    "llama": "a stock class holds it(.|\n)*mixer: mamba2, target: granitemoehybrid",
    "olmo2": "a stock class holds it(.|\n)*mixer: gated_delta, target: olmo_hybrid",
    "olmo": "not in the table(.|\n)*fresh student",
    "mamba2": "not in the table",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_outside_the_table_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(ConversionError, match=REFUSED[model_type]):
        plan_conversion(tiny_config(model_type), replace=[0], target="in_place")


def test_refuses_what_does_not_fit() -> None:
    teacher = tiny_model("gemma2")
    with pytest.raises(ConversionError, match="no conversion to this mixer"):
        convert(teacher, replace=[0], mixer="lightning", target="in_place")
    with pytest.raises(ConversionError, match="Unknown initialization"):
        convert(teacher, replace=[0], init="zero", target="in_place")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="names block 3, but the model has 3 blocks"):
        convert(teacher, replace=[3], target="in_place")
    with pytest.raises(ConversionError, match="new mixers already"):
        convert(convert(teacher, replace=[0], target="in_place"), replace=[1], target="in_place")
    with pytest.raises(ConversionError, match="more than the past"):
        plan_conversion(tiny_config("gemma3_text", use_bidirectional_attention=True), replace=[0], target="in_place")
    with pytest.raises(ConversionError, match=r"reads images too(.|\n)*Gemma3ForCausalLM"):
        plan_conversion(AutoConfig.for_model("gemma3"), replace=[0], target="in_place")


def test_a_window_that_no_stock_class_has_is_no_reason_to_name_one() -> None:
    with pytest.raises(ConversionError, match=r"not in the table(.|\n)*fresh student") as caught:
        plan_conversion(tiny_config("phi3", sliding_window=8), replace=[0], target="in_place")
    assert "a stock class holds it" not in str(caught.value)
