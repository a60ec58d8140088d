"""The mapping file's schema: frozen pydantic models, foreign keys refused, scalars strict.

Each field has one owner here; nothing becomes a command-line flag by accident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from xarch_kd.mapping_file.layer_choice import LayerStrategy
from xarch_kd.mapping_file.mixer_sizes import Mamba2Options
from xarch_kd.mapping_file.objectives import Align, Tokens
from xarch_kd.mapping_file.prefixes import Prefixes, PresetName, prefix_settings
from xarch_kd.mapping_file.scalars import ConfigModel, ConfigValues, LayerIndex, Name, NonNegative, Number, Positive
from xarch_kd.mapping_file.text import MixtureSource, Text
from xarch_kd.mapping_file.training import Cache, Lora, LoraPart, Optimizer, StageEvaluation, WeightAveraging

Dtype = Literal["float32", "bfloat16", "float16"]
MixerName = Literal["mamba2", "gated_delta", "window"]
TargetName = Literal["auto", "bamba", "granitemoehybrid", "qwen3_5", "olmo_hybrid", "in_place"]
SuiteName = Literal["likelihood", "exposure", "generation", "diversity", "long_range", "speed"]
EvaluationSize = Literal["quick", "standard"]
Control = Literal["none", "unchanged", "shuffled"]
Trainable = Literal["mixers", "blocks", "embeddings", "norms", "head", "all"]


def _version(value: object) -> object:
    """Return a version that is truly an integer: `true` and `1.0` equal 1 in Python."""
    if type(value) is not int or value != 1:
        raise ValueError("must be the number 1, the only version there is")
    return value


class Paths(ConfigModel):
    """Attribute paths of the modules of a model outside the table of families.

    `blocks`, `embedding`, `final_norm` and `head` start at the model; `mixer` and `mlp` start at a block.
    """

    blocks: str
    mixer: str
    mlp: str | None = None
    embedding: str | None = None
    final_norm: str | None = None
    head: str | None = None


class Model(ConfigModel):
    """A model reference: hub id, local folder, `.gguf` file, or `package:distribution/file.gguf`.

    `dtype: auto` is bfloat16 where this machine multiplies matrices faster in it, else float32.
    `quantization` quantizes the frozen teacher's linear layers while it is loaded, by torchao; its head stays as it is.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal[Dtype, "auto"] = "float32"
    quantization: Literal["int8", "int4"] | None = None
    paths: Paths | None = None


class ConversionOptions(ConfigModel):
    """Conversion of the teacher to a hybrid. Exactly one of `keep_attention` and `replace`, in the same syntax.

    A list of layers, words such as `every 4`, or a strategy with a budget that chooses them.
    `mamba2` sets sizes of the mixers of a stock class with `mixer: mamba2`.
    With `mixer: window` a token attends to the last `window` tokens and to the first `sinks` ones.
    """

    mixer: MixerName
    keep_attention: str | tuple[LayerIndex, ...] | LayerStrategy | None = None
    replace: str | tuple[LayerIndex, ...] | LayerStrategy | None = None
    target: TargetName = "auto"
    init: Literal["attention", "random"] = "attention"
    mamba2: Mamba2Options | None = None
    window: Annotated[int, Field(ge=1)] | None = None
    sinks: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _mamba2_only(self) -> ConversionOptions:
        if self.mamba2 is not None and (self.mixer != "mamba2" or self.target == "in_place"):
            raise ValueError("mamba2 sets sizes of a stock class with mixer: mamba2; remove it")
        return self

    @model_validator(mode="after")
    def _window_of_its_mixer(self) -> ConversionOptions:
        if self.mixer == "window" and (self.window is None or self.init == "random"):
            raise ValueError("mixer: window has init: attention and needs its length, e.g. window: 512 and sinks: 4")
        choice = self.keep_attention if self.replace is None else self.replace
        if self.mixer == "window" and isinstance(choice, LayerStrategy) and choice.is_measured:
            raise ValueError(
                f"strategy: {choice.strategy} measures new mixers alone, and a window is a mask of the whole model: "
                "give a list of layers, or strategy: uniform | random"
            )
        if self.mixer != "window" and (self.window is not None or self.sinks):
            raise ValueError(f"window and sinks are keys of mixer: window, found mixer: {self.mixer}")
        return self

    @model_validator(mode="after")
    def _one_selection(self) -> ConversionOptions:
        if (self.keep_attention is None) == (self.replace is None):
            raise ValueError(
                "exactly one of keep_attention | replace must be given, "
                "e.g. keep_attention: every 4, or replace: {strategy: sensitivity, budget: 0.5}"
            )
        return self

    @property
    def selection(self) -> str | tuple[LayerIndex, ...] | LayerStrategy:
        """The value of the key that is given, `keep_attention` or `replace`."""
        value = self.keep_attention if self.keep_attention is not None else self.replace
        assert value is not None
        return value

    @property
    def selection_key(self) -> Literal["keep_attention", "replace"]:
        """The key that is given."""
        return "keep_attention" if self.keep_attention is not None else "replace"

    @property
    def mixer_sizes(self) -> dict[str, int | bool] | None:
        """The sizes in `mamba2` that differ from their defaults, as `convert` takes them."""
        return None if self.mamba2 is None else self.mamba2.model_dump(exclude_defaults=True)

    @property
    def layers(self) -> dict[str, str | tuple[LayerIndex, ...]]:
        """The key that is given with its list or words, as the converter takes them. A strategy is neither."""
        assert not isinstance(self.selection, LayerStrategy)
        return {self.selection_key: self.selection}


class Student(ConfigModel):
    """Exactly one of `model` (an existing student), `config` (built fresh) or `convert`.

    `config` is a folder with a `config.json`, or the values themselves: `{model_type: mamba2, hidden_size: 256, …}`.
    With `embeddings: teacher` a fresh student starts from the teacher's token embeddings, projected where it is
    narrower, and with `head: closed_form` its untied head is the teacher's after a ridge map of the head input, fitted
    on calibration text. `dtype` is what the student is saved in; while it trains, its weights are float32.
    `format: mamba_ssm` writes it in that package's format too.
    """

    model: str | None = None
    config: str | ConfigValues | None = None
    convert: ConversionOptions | None = None
    embeddings: Literal["fresh", "teacher"] = "fresh"
    head: Literal["fresh", "closed_form"] = "fresh"
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    format: Literal["transformers", "mamba_ssm"] = "transformers"
    paths: Paths | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Student:
        given = [name for name in ("model", "config", "convert") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of model | config | convert must be given, found {' and '.join(given) or 'none'}"
            )
        if self.embeddings == "teacher" and self.config is None:
            raise ValueError(
                "embeddings: teacher is for a student built fresh from a config: a converted one has the teacher's "
                "embeddings already, and an existing one keeps its own"
            )
        if self.head == "closed_form" and self.config is None:
            raise ValueError(
                "head: closed_form is for a student built fresh from a config: a converted one has the teacher's head "
                "already, and an existing one keeps its own"
            )
        return self


class Data(Text):
    """Training text: tokenized by the teacher's tokenizer, packed into rows of `sequence_length` tokens.

    `mixture` has several sources, drawn by weight. `packing`: rows cut across documents (`wrapped`), documents kept
    whole where they fit (`best_fit`), or one document per row (`none`). With `documents: isolated`, no document of
    a row is read in the context of another. `held_out` is the share of documents kept for evaluation, chosen by a
    hash of their content, 0.1 unless `evaluation` names other text for it; `batch_size` is rows per micro-batch.
    With `streaming`, text is read and tokenized while it is trained on, in its own order. `processes` tokenize, by
    default one per processor; the tokens are the same whatever their number. With `order: shared` all stages draw
    the same batches in the same order and keep the teacher's features in one cache.
    """

    sources: ClassVar[tuple[str, ...]] = ("builtin", "files", "dataset", "mixture")

    mixture: Annotated[tuple[MixtureSource, ...], Field(min_length=1)] | None = None
    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 4
    packing: Literal["wrapped", "best_fit", "none"] = "wrapped"
    documents: Literal["joined", "isolated"] = "joined"
    held_out: Annotated[Number, Field(ge=0, lt=1)] | None = None
    evaluation: Text | None = None
    streaming: bool = False
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    order: Literal["per_stage", "shared"] = "per_stage"

    @property
    def held_out_share(self) -> float:
        """Share of the documents that is held out."""
        if self.held_out is None:
            return 0.0 if self.evaluation is not None else 0.1
        return self.held_out

    @model_validator(mode="after")
    def _one_held_out_text(self) -> Data:
        if self.evaluation is not None and self.held_out:
            raise ValueError("held_out is the text to measure on unless evaluation names other text: give one of them")
        return self

    @model_validator(mode="after")
    def _can_be_shared(self) -> Data:
        if self.order == "shared" and self.packing == "none":
            raise ValueError(
                "order: shared needs rows of one length; with packing: none, batches of similar length follow from the "
                "number of batches of each stage. Use packing: wrapped or best_fit"
            )
        return self

    @model_validator(mode="after")
    def _sources_have_their_own_keys(self) -> Data:
        ignored = sorted(self.model_fields_set & set(Text.model_fields) - {"builtin", "files", "dataset"})
        if self.mixture is not None and ignored:
            raise ValueError(f"with a mixture, each of its sources has its own {', '.join(ignored)}: move it there")
        return self


class Stage(ConfigModel):
    """One `transformers.Trainer` run of `steps` optimizer steps, or of `epochs` passes over its rows.

    `batches` bounds the number of different batches drawn: further steps go over them again in a new order, which
    with a cache costs no teacher pass. `precision` is the autocast type of the student's pass;
    `auto` is bfloat16 where this machine multiplies matrices faster in it, else float32. With
    `head: from_projector` the projector of the tap `head_input` becomes part of the student's head when the stage ends.
    """

    name: Name
    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Positive | None = None
    train: tuple[Trainable | LoraPart, ...]
    inputs: Literal["teacher", "student"] = "student"
    align: tuple[Align, ...] = ()
    tokens: Tokens | None = None
    optimizer: Optimizer = Optimizer()
    batch_size: Annotated[int, Field(ge=1)] | None = None
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    batches: Annotated[int, Field(ge=1)] | None = None
    cache: Literal["memory", "disk", "off"] | Cache = "off"
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    gradient_checkpointing: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    evaluation: StageEvaluation | None = None
    ema: WeightAveraging | None = None
    head: Literal["keep", "from_projector"] = "keep"
    prefixes: PresetName | Prefixes | None = None

    @property
    def prefix_settings(self) -> Prefixes | None:
        """Sources of the stage's rows with all their settings, None for data alone."""
        return None if self.prefixes is None else prefix_settings(self.prefixes)

    @property
    def parts(self) -> tuple[Trainable, ...]:
        """Parts of the student whose own parameters train."""
        return tuple(part for part in self.train if isinstance(part, str))

    @property
    def lora(self) -> Lora | None:
        """The adapters that train, None without any."""
        return next((part.lora for part in self.train if isinstance(part, LoraPart)), None)

    @property
    def cache_place(self) -> Literal["memory", "disk", "off"]:
        """Place of the feature cache, for both spellings."""
        return self.cache if isinstance(self.cache, str) else self.cache.where

    @property
    def cache_limit(self) -> int:
        """Bytes that the cache may take at most."""
        limit = (Cache() if isinstance(self.cache, str) else self.cache).limit_gib
        return int(limit) * 2**30 + int(limit % 1 * 2**30)

    @model_validator(mode="after")
    def _has_an_objective(self) -> Stage:
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise ValueError(f"exactly one of steps | epochs must be given, e.g. steps: 100, found {found}")
        if not self.align and self.tokens is None:
            raise ValueError("a stage needs at least one objective: give align and/or tokens")
        if len(self.train) == 0:
            raise ValueError("train is empty, so nothing would learn")
        if len(self.train) - len(self.parts) > 1:
            raise ValueError("train has lora twice; name all parts in one: {lora: {rank: 16, on: [attention, mlp]}}")
        twice = _given_twice(entry.name for entry in self.align)
        if twice:
            raise ValueError(f"names of align entries must differ, found twice: {twice}")
        return self


class Calibration(ConfigModel):
    """Calibration pass over about `tokens` tokens of the training text, for strategies that depend on data."""

    tokens: Annotated[int, Field(ge=64)] = 16_384


class Speed(ConfigModel):
    """Settings of the suite `speed`: bytes of cache and times of both models at context `lengths`, in tokens.

    Lengths are by default 256 to 65,536 in steps of four, as far as both models have positions. Times are measured for
    about `seconds` altogether, 0 measures bytes alone. `memory_gib` is the memory of the largest batch, `dtype` that of
    both models.
    """

    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    seconds: NonNegative = 0.0
    memory_gib: Positive = 1.0
    dtype: Dtype = "bfloat16"

    @model_validator(mode="after")
    def _lengths_increase(self) -> Speed:
        lengths = self.lengths or ()
        if list(lengths) != sorted(set(lengths)):
            raise ValueError(f"lengths must increase, found {', '.join(map(str, lengths))}")
        return self


class Evaluate(ConfigModel):
    """Evaluation after training, on at most `tokens` of the held-out text and of each text of `also`.

    `size` is that of the suites that sample; each model writes at most `tokens` tokens after their prompts.
    """

    suites: Annotated[tuple[SuiteName, ...], Field(min_length=1)] = (
        "likelihood",
        "exposure",
        "generation",
        "diversity",
        "long_range",
        "speed",
    )
    size: EvaluationSize = "quick"
    tokens: Annotated[int, Field(ge=64)] = 16_384
    also: tuple[Text, ...] = ()
    speed: Speed = Speed()


class MappingFile(ConfigModel):
    """A whole mapping file.

    `control` makes the run a control of its own recipe: `unchanged` trains the teacher itself, `shuffled` matches each
    row with the teacher's features of another row.

    >>> import xarch_kd as xkd
    >>> from xarch_kd.testing.examples import write_example_files
    >>> write_example_files()  # teacher/, text.txt and mapping.yaml, all tiny
    >>> mapping, _, _ = xkd.load_mapping("mapping.yaml")
    >>> isinstance(mapping, xkd.MappingFile), mapping.stages[0].steps
    (True, 2)
    """

    version: Annotated[Literal[1], BeforeValidator(_version)]
    teacher: Model
    student: Student
    data: Data
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tracking: tuple[Literal["tensorboard", "wandb"], ...] = ()
    calibration: Calibration = Calibration()
    control: Control = "none"
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _streamed_rows_are_drawn_once(self) -> MappingFile:
        again = [stage.name for stage in self.stages if stage.batches is not None]
        if self.data.streaming and again:
            raise ValueError(f"streamed rows cannot be drawn again: leave out batches of stage {', '.join(again)}")
        passes = [stage.name for stage in self.stages if stage.epochs is not None]
        if self.data.streaming and passes:
            raise ValueError(f"the length of a stream is not known: give steps, not epochs, to {', '.join(passes)}")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> MappingFile:
        twice = _given_twice(stage.name for stage in self.stages)
        if twice:
            raise ValueError(f"stage names must differ, found twice: {twice}")
        return self


def _given_twice(names: Iterable[str]) -> str:
    return ", ".join(name for name, count in Counter(names).items() if count > 1)
