"""Where training data comes from and how its rows are read."""

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
    """A second, smaller table whose columns are added to each row (a left join, held in memory)."""

    file: Path
    """File of the second table."""
    key: Column
    """Column that both tables have; its values are unique in the second table."""
    format: FileFormat = "auto"
    """File format. `auto`: by the file's ending."""


class DataSource(ApiModel):
    """One place rows come from: exactly one of `inline`, `file`, `directory`, `hub`, `uri` and `stage`."""

    model_config = rules(
        exactly_one(*DATA_SOURCES),
        cel("has(self.hub) || !has(self.subset)", "subset goes with hub"),
        cel("has(self.hub) || !has(self.revision)", "revision goes with hub"),
    )

    inline: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        json_schema_extra={"items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    )
    """Rows written in the job itself, each a mapping from column to value."""
    file: Path | None = None
    """A file, or a glob such as `data/*.jsonl`. `.gz`, `.bz2`, `.xz` and `.zst` are unpacked while reading."""
    directory: Path | None = None
    """A directory; every file of the format below it is read, in order of name."""
    hub: HubId | None = None
    """Dataset id on the Hugging Face hub."""
    uri: Uri | None = None
    """Storage URI of a file, a glob or a directory (one that ends in `/`), such as `s3://bucket/data/*.parquet`."""
    stage: StageName | None = None
    """Name of an earlier `synthesize` stage, whose rows these are."""
    format: FileFormat = "auto"
    """File format. `auto`: by the file's ending; in a directory, by the endings found there, which must agree.
    `jsonl`: one object per line. `json`: an array of objects, an object that holds one, or one object per line."""
    subset: Column | None = None
    """Configuration of the hub dataset. Default: the dataset's own default."""
    split: Column = "train"
    """Split of the hub dataset."""
    revision: Revision | None = None
    """Branch, tag or commit of the hub dataset. Default: its main branch."""
    join: Join | None = None
    """Table whose columns are added to this source's rows."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *DATA_SOURCES)
        for name in ("subset", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                yield f"{name} goes with hub"


class Columns(ApiModel):
    """The names that the data's columns go by, where they differ from the standard ones."""

    text: Column = "text"
    """Plain text."""
    messages: Column = "messages"
    """Conversation: a list of `{role, content}` or `{from, value}`."""
    system: Column = "system"
    """System message that stands before the row's conversation. Strings in `prompt` and its answers are a
    conversation, too, where the row has this column. It is not read where `template` is set."""
    tools: Column = "tools"
    """Tools that the conversation may call, for the chat template: a list of JSON schemas or its JSON."""
    prompt: Column = "prompt"
    """Prompt: a string or a list of messages."""
    completion: Column = "completion"
    """Completion: a string or a list of messages."""
    chosen: Column = "chosen"
    """Preferred answer: a string, a message or a list of messages, with or without the prompt before it."""
    rejected: Column = "rejected"
    """Rejected answer, in the same form as `chosen`."""

    @property
    def named(self) -> set[str]:
        """The fields that differ from the standard names: those that a job names. It holds after a round through JSON,
        which sets every field."""
        return {name for name, value in self if value != type(self).model_fields[name].default}


class RowTemplate(ApiModel):
    """Text made from a row's columns, `{column}` by `{column}`; `{{` is a literal brace."""

    text: Template | None = None
    """Template of the plain text."""
    system: Template | None = None
    """Template of a system message put before each prompt."""
    prompt: Template | None = None
    """Template of the prompt, a user's message."""
    completion: Template | None = None
    """Template of the completion, an assistant's message."""
    chosen: Template | None = None
    """Template of the preferred answer."""
    rejected: Template | None = None
    """Template of the rejected answer."""


class Transcript(ApiModel):
    """How turns are marked in data that keeps a whole dialogue in one string."""

    user: Marker = "\n\nHuman:"
    """Text before a user's turn."""
    assistant: Marker = "\n\nAssistant:"
    """Text before an assistant's turn."""


class DataSpec(ApiModel):
    """Training data: sources, read one after the other as one table."""

    sources: Annotated[list[DataSource], Field(min_length=1, max_length=64)]
    """Where the rows come from."""
    columns: Columns = Columns()
    """The names that the columns go by."""
    template: RowTemplate | None = None
    """Texts made from the columns. Default: the columns as they are."""
    transcript: Transcript | None = None
    """Set (`{}` is enough for the hh-rlhf form) where a string holds a whole dialogue of marked turns."""
    limit: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Use only so many rows, the first of the shuffled table. Default: all."""
    validation_split: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of the rows held out for evaluation, chosen by `seed`."""
    shuffle: bool = True
    """Shuffle the rows once, by `seed`, before they are split and packed."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the shuffle and of the held-out split."""
    streaming: bool = False
    """Read and tokenise while training, keeping nothing on disk, for data that does not fit there. Needs `maxSteps`;
    rows are shuffled within a buffer; `validationSplit` and `limit` don't apply."""

    model_config = rules(
        cel(
            "!self.streaming || (self.validationSplit == 0.0 && !has(self.limit))",
            "streaming data has no validationSplit and no limit: give evalData instead",
        )
    )

    def faults(self) -> Iterator[str]:
        if self.streaming and (self.validation_split or self.limit is not None):
            yield "streaming data has no validationSplit and no limit: give evalData instead"
