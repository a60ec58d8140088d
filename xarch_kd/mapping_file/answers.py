"""Answers to keys and options of other training tools: what does the same here, or that nothing does.

Only the standard library is imported here, so that the command line can answer before anything else is loaded.
"""

from __future__ import annotations

from typing import Final

_PROCESSES = (
    "not supported. Several processes train data-parallel: python -m torch.distributed.run --nproc-per-node 2 "
    "-m xarch_kd train FILE --output FOLDER. Less memory: gradient_checkpointing: true, optimizer: {optim: adafactor}, "
    "a smaller batch_size with gradient_accumulation"
)
_ADAPTERS = "not a key here. Name adapters in train of a stage: train: [{lora: {rank: 16, on: [attention, mlp]}}]"
_QUANTIZED = "not a key here. A frozen teacher is quantized by teacher: {quantization: int8} or int4; students are not"
_CODE = "not supported: nothing that a model folder holds is run. The model's class must be one of transformers'"
_TEMPLATE = "not a key here. The chat template is the tokenizer's own; change it in the tokenizer's folder"
_TOKENIZER = "not a key here. Write tokenizer in teacher, or in student for a student that exists"
_CACHE = (
    "not a key here. HF_HOME is the cache of hub files; cache: memory or disk of a stage keeps the teacher's features"
)
_OUTPUT = "not a key here. The run folder is given on the command line: xarch-kd train FILE --output FOLDER"
_RESUME = "not a key here. Resume on the command line: xarch-kd train FILE --output FOLDER --resume"
_HUB = "not supported: nothing is uploaded. `hf upload REPO FOLDER/student` uploads the student with its card"
_LAYER_MAP = "not a key here. Name layers in an entry of align: layers: same, uniform, cka, or a list of pairs"
_REPLACED = "not a key here. Name layers in student: {convert: {replace: [5, 6, 7]}} or {keep_attention: …}"
_SIZES = "not a key here. Sizes of a fresh student are in student: {config: {model_type: mamba2, …}}"
_MIXERS = "not a key here. Sizes of converted mixers are in student: {convert: {mamba2: {expand: 2}}}"
_SAVED = "not a key here. checkpoint_every of a stage is the distance of checkpoints in steps; the last two are kept"
_LOGS = "not a key here. Every step is written to events.jsonl of the run folder; tracking: [tensorboard] adds a writer"
_TRACKING = "not a key here. Write tracking: [wandb] or [tensorboard]; their own environment variables set the rest"
_EVALUATED = "not a key here. Evaluate in training by evaluation: {every: 100} of a stage, after it by evaluate"
_HELD_OUT = "not a key here. Held-out text is a share, data: {held_out: 0.1}, or files named in data: {evaluation: …}"
_BEST = "not a key here. Write evaluation: {every: 100, keep: best, patience: 3} in a stage"
_LABELS = "not a key here. Write train_on: all, completions or assistant beside the text's source"
_SOURCE = "not a key here. Text is named in data: {builtin: …}, {files: […]}, {dataset: …} or {mixture: […]}"
_LENGTH = "not a key here. Write data: {sequence_length: 512}"
_PACKING = "not a key here. Write data: {packing: wrapped}, best_fit or none"
_SIZE = "not a key here. Write batch_size in data or in a stage, and gradient_accumulation in the stage"
_STEPS = "not a key here. Use steps or epochs in each stage"
_RATE = "not a key here. Write optimizer: {lr: 1.0e-3} in the stage"
_ADAM = "not a key here. Write optimizer: {betas: [0.9, 0.95]} in the stage; args: {eps: 1.0e-8} has the rest"
_CLIP = "not a key here. Write optimizer: {max_grad_norm: 1.0} in the stage, or null for no clipping"
_SCHEDULE = "not a key here. Write optimizer: {schedule: cosine, warmup: 0.1} in the stage"
_OPTIM = "not a key here. Write optimizer: {optim: adamw_torch, args: {}} in the stage"
_PRECISION = "not a key here. Use precision: bfloat16 in the stage"
_DEVICE = "not a key here. Write device: cpu, cuda or cuda:1 at the top of the file"
_TOKENS = "not a key here. Write tokens: {divergence: forward_kl, temperature: 2.0, weight: 1.0} in the stage"
_PREFIXES = "not a key here. Write prefixes: gkd in the stage, or seqkd, imitkd, distillm, on_policy, stable_on_policy"
_CHECKPOINTING = "not a key here. Write gradient_checkpointing: true in the stage"
_KERNELS = "not a key here. Kernels are chosen by what the device runs; impl in an objective names one"
_TEACHER = "not a key here. Write teacher: {model: …}"
_STUDENT = "not a key here. Write student: {convert: …}, {config: …} or {model: …}"
_HIDDEN = "not a key here. Write an entry of align: {name: hidden, tap: hidden, layers: uniform, loss: {kind: cosine}}"
_ATTENTION = "not a key here. Write an entry of align: {name: mixing, tap: mixing, loss: {kind: mixing}}"
_SEED = "not a key here. Write seed: 0 at the top of the file; runs on a CPU are bitwise reproducible"
_EMA = "not a key here. Write ema: {decay: 0.999} in the stage"
_LOADING = "not a key here: the teacher is read into memory whole, in teacher: {dtype: bfloat16}"
_POSITIONS = "not a key here. Positions follow the teacher's config; change them in its config.json"
_COPYING = "not a key here. Copying is a task of the suite long_range: evaluate: {suites: [likelihood, long_range]}"
_VERBOSE = "not a key here. `--debug` on the command line shows tracebacks"


def _each(answer: str, *keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, answer)


# Key of other training tools → what to do here.
ANSWERS: Final[dict[str, str]] = {
    "copying": _COPYING,
    **_each(_PROCESSES, "deepspeed", "fsdp", "fsdp_config", "zero_stage", "zero_optimization", "tensor_parallel"),
    **_each(_PROCESSES, "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "sequence_parallel"),
    **_each(_PROCESSES, "num_gpus", "gpus", "n_gpus", "nproc_per_node", "nodes", "num_nodes", "local_rank"),
    **_each(_PROCESSES, "ddp_find_unused_parameters", "distributed_backend", "accelerator", "devices"),
    **_each(_ADAPTERS, "lora", "peft", "qlora", "peft_config", "lora_config", "adapter", "lora_r", "lora_alpha"),
    **_each(_ADAPTERS, "lora_dropout", "lora_target_modules", "lora_target", "lora_rank", "use_dora", "use_rslora"),
    **_each(_ADAPTERS, "peft_type", "finetuning_type"),
    **_each(_QUANTIZED, "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "quantization_bit"),
    **_each(_CODE, "trust_remote_code", "remote_code"),
    **_each(_TEMPLATE, "chat_template", "template", "system_prompt"),
    **_each(_TOKENIZER, "tokenizer_name", "tokenizer_path", "tokenizer_name_or_path"),
    **_each(_CACHE, "cache_dir", "overwrite_cache"),
    **_each(_OUTPUT, "output", "output_dir", "overwrite_output_dir", "logging_dir", "run_name", "tensorboard_dir"),
    **_each(_RESUME, "resume", "resume_from_checkpoint", "auto_resume"),
    **_each(_HUB, "push_to_hub", "hub_model_id", "hub_strategy", "hub_token"),
    **_each(_LAYER_MAP, "layer_mapping", "layer_map", "intermediate_matches", "student_layers", "teacher_layers"),
    **_each(_REPLACED, "num_layers_to_replace", "layers_to_replace", "attn_layers", "attention_layers", "ssm_layers"),
    **_each(_REPLACED, "mamba_layers"),
    **_each(_SIZES, "hidden_size", "num_hidden_layers", "num_layers", "n_layers", "d_model", "ssm_cfg", "vocab_size"),
    **_each(_MIXERS, "d_state", "d_conv", "d_inner", "rms_norm"),
    **_each(_SAVED, "save_steps", "save_strategy", "save_total_limit", "saves_per_epoch", "checkpoint_steps"),
    **_each(_LOGS, "logging_steps", "logging_strategy", "log_every", "log_interval"),
    **_each(_TRACKING, "report_to", "wandb", "wandb_project", "wandb_entity", "wandb_run_id", "tensorboard"),
    **_each(_TRACKING, "mlflow_tracking_uri", "logger"),
    **_each(_EVALUATED, "eval_steps", "evaluation_strategy", "eval_strategy", "evals_per_epoch", "do_eval"),
    **_each(_EVALUATED, "do_train", "do_predict", "predict_with_generate", "generation_max_length", "eval_batch_size"),
    **_each(_EVALUATED, "per_device_eval_batch_size", "max_eval_samples", "eval_packing"),
    **_each(_HELD_OUT, "val_set_size", "val_size", "eval_split", "test_size", "validation_split", "validation_file"),
    **_each(_HELD_OUT, "test_file", "eval_dataset", "validation"),
    **_each(_BEST, "early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    "early_stopping": _BEST,
    **_each(_LABELS, "train_on_inputs", "mask_prompt", "completion_only_loss", "assistant_only_loss"),
    **_each(_SOURCE, "dataset_name", "dataset_path", "datasets", "train_file", "data_files", "data_path"),
    **_each(_SOURCE, "dataset_text_field", "text_column", "text_field", "dataset_split", "max_train_samples"),
    **_each(
        _LENGTH, "cutoff_len", "max_seq_length", "max_length", "max_seq_len", "block_size", "seq_len", "seq_length"
    ),
    **_each(_LENGTH, "context_length", "pad_to_sequence_len", "model_max_length"),
    **_each(_PACKING, "sample_packing", "packing_strategy", "group_by_length"),
    **_each(_SIZE, "micro_batch_size", "per_device_train_batch_size", "train_batch_size", "global_batch_size"),
    **_each(_SIZE, "batch_size_per_gpu", "gradient_accumulation_steps", "grad_accum"),
    **_each(_STEPS, "num_train_epochs", "num_epochs", "epochs_num", "max_steps", "train_steps", "total_steps"),
    **_each(_STEPS, "iterations", "n_iter"),
    **_each(_RATE, "learning_rate"),
    **_each(_ADAM, "adam_beta1", "adam_beta2", "adam_epsilon", "adam_beta"),
    **_each(_CLIP, "grad_clip", "gradient_clipping", "clip_grad_norm", "max_norm"),
    **_each(_SCHEDULE, "lr_scheduler", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps"),
    **_each(_SCHEDULE, "num_warmup_steps", "scheduler"),
    **_each(_OPTIM, "optimizer_type", "optim_args", "optimizer_name"),
    **_each(_PRECISION, "bf16", "mixed_precision", "amp", "precision_type", "tf32"),
    "fp16": "not supported. Use precision: bfloat16 in the stage",
    "fp8": "not supported for training. Use precision: bfloat16 in the stage",
    **_each(_DEVICE, "no_cuda", "use_cpu", "use_cuda", "cuda", "gpu", "device_map"),
    **_each(_LOADING, "low_cpu_mem_usage", "max_memory", "torch_dtype"),
    **_each(_TOKENS, "temperature_kd", "kd_temperature", "distillation_temperature", "kd_ratio", "kd_alpha", "kd_loss"),
    **_each(_TOKENS, "kd_loss_type", "alpha_ce", "alpha_mlm", "alpha_cos", "alpha_kd", "gkd_beta"),
    **_each(_PREFIXES, "lmbda", "seq_kd", "on_policy", "student_data_fraction", "gkd", "distillm"),
    **_each(_CHECKPOINTING, "activation_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"),
    **_each(_KERNELS, "attn_implementation", "flash_attention", "flash_attn", "use_flash_attn", "use_flash_attention"),
    **_each(_KERNELS, "liger", "use_liger_kernel", "unsloth", "torch_compile", "compile", "compile_mode"),
    **_each(_TEACHER, "teacher_model", "teacher_model_name_or_path", "teacher_path", "base_model"),
    **_each(_TEACHER, "model_name_or_path", "model_name", "model_type", "ref_model"),
    **_each(_STUDENT, "student_model", "student_path", "student_model_name_or_path"),
    **_each(_HIDDEN, "hidden_loss", "hidden_mse"),
    **_each(_ATTENTION, "attention_loss", "attn_loss"),
    **_each(_SEED, "random_seed", "data_seed", "shuffle_seed", "full_determinism", "deterministic"),
    **_each(_EMA, "ema_decay", "use_ema"),
    **_each(_POSITIONS, "rope_scaling", "rope_theta"),
    **_each(_VERBOSE, "debug", "verbose", "log_level"),
    "shuffle": "not a key here. The order of rows follows from seed",
    "add_bos_token": "not a key here. Write data: {bos: always}, never or auto",
    "add_eos_token": "not a key here. Write data: {eos: always}, never or auto",
    "shuffle_buffer": "not a key here. Data that is streamed is read in the order of its source",
    "streaming_buffer": "not a key here. Data that is streamed is read in the order of its source",
    "num_workers": "not a key here: reading a batch from the token store takes no worker",
    "dataloader_num_workers": "not a key here: reading a batch from the token store takes no worker",
    "dataloader_pin_memory": "not a key here: reading a batch from the token store takes no worker",
    "preprocessing_num_workers": "not a key here: text is tokenized on all processors",
    "label_smoothing": "not supported: a teacher's distribution takes its place",
    "label_smoothing_factor": "not supported: a teacher's distribution takes its place",
    "vocab_size_multiple": "not supported: a student has the vocabulary of its tokenizer",
    "neftune_noise_alpha": "not supported",
    "reward_model": "not supported: students learn from a teacher, not from a reward",
    "num_beams": "not supported: text is generated by sampling",
    "freeze_trainable_layers": "not a key here. What trains is named in train of a stage: train: [mixers]",
}


def answer(word: str) -> str | None:
    """Return what to do in place of a key or option of another tool, None for a word without an answer.

    >>> answer("--learning-rate")
    'not a key here. Write optimizer: {lr: 1.0e-3} in the stage'
    """
    return ANSWERS.get(word.lstrip("-").partition("=")[0].replace("-", "_").lower())
