"""Sources of training data, and how their rows are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, exactly_one, expects, not_exactly_one, rules
from finetune_api.model import HubId, Path, Revision, Uri

DATA_SOURCES = ("inline", "file", "directory", "hub", "uri", "stage")
StageName = Annotated[
    str,
    Field(
        max_length=40,
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        json_schema_extra=expects("up to 40 lower-case letters, digits and inner dashes"),
    ),
]
FileFormat = Literal["auto", "jsonl", "json", "csv", "parquet", "text"]
Column = Annotated[str, Field(min_length=1, max_length=256)]
Template = Annotated[str, Field(min_length=1, max_length=65536)]
Marker = Annotated[str, Field(min_length=1, max_length=64)]


class Join(ApiModel):
    """A second table whose columns are added to each row (a left join; the table is held in memory)."""

    file: Path
    """File of the second table."""
    key: Column
    """Column that both tables have. Its values must be unique in the second table."""
    format: FileFormat = "auto"
    """File format. `auto`: by the file name extension."""


class DataSource(ApiModel):
    """One source of rows. Set exactly one of `inline`, `file`, `directory`, `hub`, `uri` and `stage`."""

    model_config = rules(
        exactly_one(*DATA_SOURCES),
        cel("has(self.hub) || !has(self.subset)", "subset needs hub"),
        cel("has(self.hub) || !has(self.revision)", "revision needs hub"),
    )

    inline: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        json_schema_extra={"items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    )
    """Rows in the job itself, each a mapping from column to value."""
    file: Path | None = None
    """A file, or a glob such as `data/*.jsonl`. Files that end in `.gz`, `.bz2`, `.xz` or `.zst` are decompressed while
    reading."""
    directory: Path | None = None
    """A directory. All files of the format below it are read, sorted by name."""
    hub: HubId | None = None
    """Dataset id on the Hugging Face Hub."""
    uri: Uri | None = None
    """Storage URI of a file, a glob, or a directory (ends in `/`), such as `s3://bucket/data/*.parquet`."""
    stage: StageName | None = None
    """Name of an earlier `synthesize` stage whose rows are read."""
    format: FileFormat = "auto"
    """File format. `auto`: by the file name extension; all files of a directory must have the same format. `jsonl`: one
    object per line. `json`: an array of objects, an object that contains such an array, or one object per line."""
    subset: Column | None = None
    """Configuration (subset) of the Hub dataset. Default: the default configuration of the dataset."""
    split: Column = "train"
    """Split of the Hub dataset."""
    revision: Revision | None = None
    """Branch, tag or commit of the Hub dataset. Default: the main branch."""
    join: Join | None = None
    """Table whose columns are added to the rows of this source."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *DATA_SOURCES)
        for name in ("subset", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                yield f"{name} needs hub"


class Columns(ApiModel):
    """Names of the columns in the data, if they differ from the standard names."""

    text: Column = "text"
    """Plain text."""
    messages: Column = "messages"
    """Conversation: a list of `{role, content}` or `{from, value}`."""
    system: Column = "system"
    """System message, placed before the conversation of the row. If a row has this column, strings in `prompt` and its
    answers are also read as a conversation. Ignored if `template` is set."""
    tools: Column = "tools"
    """Tools that the conversation may call, passed to the chat template: a list of JSON schemas, or that list as a JSON
    string."""
    prompt: Column = "prompt"
    """Prompt: a string or a list of messages."""
    completion: Column = "completion"
    """Completion: a string or a list of messages."""
    chosen: Column = "chosen"
    """Chosen answer: a string, a message or a list of messages, with or without the prompt before it."""
    rejected: Column = "rejected"
    """Rejected answer, in the same form as `chosen`."""

    @property
    def named(self) -> set[str]:
        """The fields that differ from the standard names.

        Unlike `model_fields_set`, this survives serialization to JSON, which sets every field.
        """
        return {name for name, value in self if value != type(self).model_fields[name].default}


class RowTemplate(ApiModel):
    """Templates that build text from the columns of a row: `{column}` inserts a column, `{{` is a literal brace."""

    text: Template | None = None
    """Template of the plain text."""
    system: Template | None = None
    """Template of a system message before each prompt."""
    prompt: Template | None = None
    """Template of the prompt, a user message."""
    completion: Template | None = None
    """Template of the completion, an assistant message."""
    chosen: Template | None = None
    """Template of the chosen answer."""
    rejected: Template | None = None
    """Template of the rejected answer."""


class Transcript(ApiModel):
    """Markers of turns, for data that stores a whole dialogue in one string."""

    user: Marker = "\n\nHuman:"
    """Text before a turn of the user."""
    assistant: Marker = "\n\nAssistant:"
    """Text before a turn of the assistant."""


class DataSpec(ApiModel):
    """Training data: one or more sources, concatenated in order."""

    sources: Annotated[list[DataSource], Field(min_length=1, max_length=64)]
    """Sources of the rows."""
    columns: Columns = Columns()
    """Names of the columns, if they differ from the standard names."""
    template: RowTemplate | None = None
    """Templates that build texts from the columns. Default: the columns are used unchanged."""
    transcript: Transcript | None = None
    """Set this if a string contains a whole dialogue with marked turns. `{}` selects the format of hh-rlhf."""
    limit: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Maximum number of rows, taken from the start of the shuffled data. Default: all."""
    validation_split: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Fraction of the rows held out for evaluation, selected by `seed`."""
    shuffle: bool = True
    """Shuffle the rows once with `seed`, before splitting and packing."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of shuffling and of the held-out split."""
    streaming: bool = False
    """Read and tokenize during training without a copy on disk, for data that does not fit on the disk. Needs
    `maxSteps`. Rows are shuffled within a buffer. Excludes `validationSplit` and `limit`."""

    model_config = rules(
        cel(
            "!self.streaming || (self.validationSplit == 0.0 && !has(self.limit))",
            "streaming excludes validationSplit and limit: set evalData for evaluation",
        )
    )

    def faults(self) -> Iterator[str]:
        if self.streaming and (self.validation_split or self.limit is not None):
            yield "streaming excludes validationSplit and limit: set evalData for evaluation"
