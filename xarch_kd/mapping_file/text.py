"""Text sources of a mapping file: where documents come from, and what of them is trained on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from xarch_kd.mapping_file.scalars import ConfigModel, Positive


class Generated(ConfigModel):
    """Text of `builtin: copy`: the number of documents, and the seed that they follow from."""

    documents: Annotated[int, Field(ge=1, le=1_000_000)] = 400
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Text(ConfigModel):
    """Exactly one of `builtin`, `files` (paths, folders or glob patterns) and `dataset` (of the library `datasets`).

    `revision` is the branch, tag or commit of a dataset of the hub. `shape` is found from the columns by default;
    `column` names the column of plain text or of conversations. `train_on` is the tokens that are to be predicted, by
    default all of plain text, the completions of `prompt_completion`, the assistant's turns of `messages`, and the
    labels of `input_ids`. With `auto`, plain text gets the bos token where the tokenizer adds one, and ends with its
    eos token; conversations begin and end as the chat template writes them. `generated` is for `builtin: copy`.
    """

    builtin: Literal["python-docs", "python-sources", "framework-docs", "licences", "library-docs", "copy"] | None = (
        None
    )
    generated: Generated | None = None
    files: tuple[str, ...] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    revision: str | None = None
    shape: Literal["auto", "text", "prompt_completion", "messages", "input_ids"] = "auto"
    column: str | None = None
    train_on: Literal["auto", "all", "completions", "assistant"] = "auto"
    bos: Literal["auto", "always", "never"] = "auto"
    eos: Literal["auto", "always", "never"] = "auto"

    # Keys of which exactly one is given.
    sources: ClassVar[tuple[str, ...]] = ("builtin", "files", "dataset")

    @model_validator(mode="after")
    def _one_text(self) -> Text:
        given = [name for name in self.sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {' | '.join(self.sources)} must be given, found {' and '.join(given) or 'none'}"
            )
        if self.column is not None and (self.builtin is not None or self.shape == "prompt_completion"):
            raise ValueError("column names the column of text, messages or input_ids in files or in a dataset")
        for name in ("dataset_config", "split", "revision"):
            if getattr(self, name) is not None and self.dataset is None:
                raise ValueError(f"{name} is for a dataset; name one with dataset: …")
        if self.generated is not None and self.builtin != "copy":
            raise ValueError("generated is for builtin: copy, the only text that is generated")
        return self


class MixtureSource(Text):
    """One source of a mixture; of the rows, the share `weight` over the sum of all weights is drawn from it."""

    weight: Positive
