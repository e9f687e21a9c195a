"""The model that a job trains: its source, tokenizer, precision and attention implementation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, exactly_one, expects, not_exactly_one, rules

HubId = Annotated[
    str,
    Field(
        max_length=256,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?$",
        json_schema_extra=expects("a Hub id such as `Qwen/Qwen3-0.6B`"),
    ),
]
Path = Annotated[str, Field(min_length=1, max_length=4096)]
Uri = Annotated[
    str,
    Field(
        max_length=4096,
        pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://.+$",
        json_schema_extra=expects("a URI such as `s3://bucket/path`"),
    ),
]
Revision = Annotated[str, Field(min_length=1, max_length=256)]

MODEL_SOURCES = ("hub", "path", "uri", "config")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSpec(ApiModel):
    """The model that the first stage starts from. Set exactly one of `hub`, `path`, `uri` and `config`."""

    model_config = rules(exactly_one(*MODEL_SOURCES))

    hub: HubId | None = None
    """Model id on the Hugging Face Hub, such as `Qwen/Qwen3-0.6B`."""
    path: Path | None = None
    """Directory with a saved transformers model."""
    uri: Uri | None = None
    """Storage URI of a directory with a saved transformers model, such as `s3://bucket/model`."""
    config: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """transformers configuration of a model with random weights: `model_type` and the snake_case fields of that model
    family. `vocab_size` and the special token ids default to those of the tokenizer."""
    revision: Revision | None = None
    """Branch, tag or commit of the Hub model. Default: the main branch."""
    tokenizer: Path | None = None
    """Directory or Hub id of the tokenizer. Default: the tokenizer of the model, or the one that a `tokenizer` stage
    trains."""
    dtype: Dtype = "auto"
    """Data type of the weights. `auto`: bfloat16 on an accelerator that supports it, else float32."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation of transformers. `auto`: the one that transformers selects for the model and the
    device."""
    dequantize: bool = False
    """Train a dequantized copy of a model with quantized weights (`quantization_config` in its config.json: mxfp4, fp8,
    bitsandbytes, compressed-tensors). The copy is stored in the cache, in the data type of the weights that are not
    quantized. Without this field, stages that train refuse such a model; evaluation and teachers use it without
    dequantization."""
    resize_embeddings: Literal["never", "auto"] = "never"
    """What to do if the embeddings have fewer rows than the tokenizer has token ids. `auto`: add rows, initialized to
    the mean of the existing rows. `never`: refuse the job."""
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=65536)] = 64
    """`resizeEmbeddings: auto` rounds the number of rows up to a multiple of this value."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *MODEL_SOURCES)
