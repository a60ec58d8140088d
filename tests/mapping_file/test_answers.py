"""Answers to keys of other tools, and suggestions for misspelt ones."""

from __future__ import annotations

import re

import pytest

from xarch_kd.cli.app import main
from xarch_kd.errors import MappingFileError, suggest
from xarch_kd.mapping_file.answers import ANSWERS, answer
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.mapping_file.scalars import ConfigModel
from xarch_kd.mapping_file.validation_messages import own_keys

# Keys of Transformers, TRL, Axolotl, LLaMA-Factory, torchtune, DeepSpeed, TextBrewer and others.
FOREIGN = [
    "base_model",
    "model_name_or_path",
    "model_name",
    "tokenizer",
    "tokenizer_name",
    "tokenizer_path",
    "model_type",
    "trust_remote_code",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "quantization_bit",
    "strict",
    "torch_dtype",
    "attn_implementation",
    "flash_attention",
    "use_flash_attn",
    "flash_attn",
    "device_map",
    "low_cpu_mem_usage",
    "max_memory",
    "rope_scaling",
    "rope_theta",
    "vocab_size_multiple",
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target",
    "use_dora",
    "peft_type",
    "finetuning_type",
    "freeze_trainable_layers",
    "num_train_epochs",
    "num_epochs",
    "epochs_num",
    "max_steps",
    "train_steps",
    "total_steps",
    "iterations",
    "n_iter",
    "micro_batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "eval_batch_size",
    "train_batch_size",
    "global_batch_size",
    "batch_size_per_gpu",
    "gradient_accumulation_steps",
    "grad_accum",
    "learning_rate",
    "lr_scheduler",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "warmup_steps",
    "num_warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "adam_beta",
    "max_grad_norm",
    "grad_clip",
    "gradient_clipping",
    "clip_grad_norm",
    "optimizer_type",
    "optim",
    "optim_args",
    "bf16",
    "fp16",
    "tf32",
    "mixed_precision",
    "amp",
    "precision_type",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_offloading",
    "torch_compile",
    "compile",
    "compile_mode",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "zero_stage",
    "zero_optimization",
    "tensor_parallel",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "num_gpus",
    "gpus",
    "n_gpus",
    "nproc_per_node",
    "nodes",
    "num_nodes",
    "local_rank",
    "ddp_find_unused_parameters",
    "distributed_backend",
    "accelerator",
    "strategy",
    "devices",
    "num_workers",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "preprocessing_num_workers",
    "dataset_name",
    "dataset_path",
    "datasets",
    "dataset_text_field",
    "text_column",
    "text_field",
    "train_file",
    "validation_file",
    "test_file",
    "val_set_size",
    "val_size",
    "eval_split",
    "test_size",
    "validation_split",
    "dataset_split",
    "data_files",
    "cutoff_len",
    "max_seq_length",
    "max_length",
    "max_seq_len",
    "block_size",
    "seq_len",
    "context_length",
    "pad_to_sequence_len",
    "sample_packing",
    "packing_strategy",
    "eval_packing",
    "group_by_length",
    "train_on_inputs",
    "mask_prompt",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template",
    "template",
    "system_prompt",
    "add_bos_token",
    "add_eos_token",
    "shuffle",
    "shuffle_seed",
    "shuffle_buffer",
    "streaming_buffer",
    "max_train_samples",
    "max_eval_samples",
    "overwrite_cache",
    "cache_dir",
    "eval_steps",
    "evaluation_strategy",
    "eval_strategy",
    "evals_per_epoch",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "saves_per_epoch",
    "logging_steps",
    "logging_dir",
    "logging_strategy",
    "report_to",
    "run_name",
    "wandb_project",
    "wandb_entity",
    "wandb_run_id",
    "mlflow_tracking_uri",
    "tensorboard_dir",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "auto_resume",
    "early_stopping_patience",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "do_train",
    "do_eval",
    "do_predict",
    "predict_with_generate",
    "generation_max_length",
    "temperature_kd",
    "kd_temperature",
    "distillation_temperature",
    "kd_ratio",
    "kd_alpha",
    "alpha_ce",
    "alpha_mlm",
    "alpha_cos",
    "alpha_kd",
    "kd_loss",
    "kd_loss_type",
    "teacher_model",
    "teacher_model_name_or_path",
    "teacher_path",
    "student_model",
    "student_path",
    "student_layers",
    "layer_mapping",
    "layer_map",
    "intermediate_matches",
    "hidden_loss",
    "attention_loss",
    "attn_loss",
    "hidden_mse",
    "lmbda",
    "beta",
    "gkd_beta",
    "num_beams",
    "reward_model",
    "ref_model",
    "neftune_noise_alpha",
    "label_smoothing",
    "label_smoothing_factor",
    "ema_decay",
    "use_ema",
    "random_seed",
    "data_seed",
    "deterministic",
    "full_determinism",
    "debug",
    "verbose",
    "log_level",
    "no_cuda",
    "use_cpu",
    "use_cuda",
    "cuda",
    "fp8",
    "unsloth",
    "liger",
    "use_liger_kernel",
    "use_rslora",
    "num_layers_to_replace",
    "layers_to_replace",
    "attn_layers",
    "ssm_layers",
    "mamba_layers",
    "d_state",
    "d_conv",
    "d_inner",
    "ssm_cfg",
    "rms_norm",
]
# Suggestions that are right: the same word, longer or in the plural.
RIGHT = {
    ("beta", "betas"),
    ("datasets", "dataset"),
    ("devices", "device"),
    ("gradient_accumulation_steps", "gradient_accumulation"),
    ("gradient_checkpointing_kwargs", "gradient_checkpointing"),
    ("kd_temperature", "temperature"),
    ("optim", "optimizer"),
    ("quantization_bit", "quantization"),
    ("temperature_kd", "temperature"),
}
MAPPING = """version: 1
teacher: {model: a}
student: {model: b}
data: {builtin: python-docs, sequence_length: 16, batch_size: 1}
stages:
  - {name: s, steps: 1, train: [all], tokens: {divergence: forward_kl}}
"""


def problem(line: str) -> str:
    with pytest.raises(MappingFileError) as caught:
        parse_mapping(MAPPING + line, "map.yaml")
    (found,) = caught.value.problems
    return found


def test_no_unrelated_key_is_suggested() -> None:
    assert len(set(FOREIGN)) == len(FOREIGN) > 200
    parts = [list(part.model_fields) for part in _parts(ConfigModel)]
    found = {
        (key, name)
        for key in FOREIGN
        for names in parts
        for name in names
        if key not in names and (suggest(key, names) == f" Did you mean '{name}'?")
    }
    assert found == RIGHT


def test_every_foreign_key_has_an_answer_or_a_place() -> None:
    unanswered = [key for key in FOREIGN if answer(key) is None and key not in own_keys()]
    assert unanswered == []


def test_answers_name_keys_that_exist() -> None:
    for key, text in ANSWERS.items():
        for named in re.findall(r"[{ ]([a-z_]+): [^ ]", text.partition("Write ")[2]):
            assert named in own_keys() | {"eps", "model_type"}, key


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("learning_rate: 1.0e-3", "learning_rate: not a key here. Write optimizer: {lr: 1.0e-3} in the stage"),
        ("epochs: 3", "epochs: unknown key here, a key of stages. Allowed here: version, "),
        ("push_to_hub: true", "push_to_hub: not supported: nothing is uploaded"),
        ("sede: 3", "sede: unknown key. Did you mean 'seed'?"),
    ],
)
def test_a_mapping_file_answers(line: str, wanted: str) -> None:
    assert wanted in problem(line)


def test_the_command_line_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "map.yaml", "--output", "run", "--learning-rate", "1e-3"]) == 2
    assert "In the mapping file: not a key here. Write optimizer: {lr: 1.0e-3}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("sede", "seed"),
        ("stpes", "steps"),
        ("tapp", "tap"),
        ("foward_kl", "forward_kl"),
        ("sequnce_lenght", "sequence_length"),
    ],
)
def test_misspelt_words(word: str, option: str) -> None:
    assert suggest(word, ["divergence", option, "replace"]) == f" Did you mean '{option}'?"
    assert suggest(word, ["divergence", "replace"]) == ""


def _parts(part: type[ConfigModel]) -> set[type[ConfigModel]]:
    return {inner for child in part.__subclasses__() for inner in (child, *_parts(child))}
