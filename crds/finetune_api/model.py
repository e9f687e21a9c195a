"""Which model a job trains, and in which numbers."""

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
        json_schema_extra=expects("a hub id such as `Qwen/Qwen3-0.6B`"),
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
    """The model that the first stage starts from: exactly one of `hub`, `path`, `uri` and `config`."""

    model_config = rules(exactly_one(*MODEL_SOURCES))

    hub: HubId | None = None
    """Model id on the Hugging Face hub, such as `Qwen/Qwen3-0.6B`."""
    path: Path | None = None
    """Directory with a saved transformers model."""
    uri: Uri | None = None
    """Storage URI of a directory with a saved transformers model, such as `s3://bucket/model`."""
    config: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """transformers configuration of a model to build from scratch: `model_type` and the family's own snake_case
    fields. `vocab_size` and the special token ids default to the tokenizer's."""
    revision: Revision | None = None
    """Branch, tag or commit of the hub model. Default: the repository's main branch."""
    tokenizer: Path | None = None
    """Directory or hub id of the tokenizer, where it isn't the model's own and no stage trains one."""
    dtype: Dtype = "auto"
    """Precision of the weights. `auto`: bfloat16 on an accelerator that has it, else float32."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel of transformers. `auto`: what transformers picks for the model and the machine."""
    dequantize: bool = False
    """Train a dequantized copy of a model whose saved weights are quantized (`quantization_config` in its config.json:
    mxfp4, fp8, bitsandbytes, compressed-tensors). The copy has the saved precision of the other weights and lies in the
    cache. Such a model is otherwise refused by stages that train; evaluation and teachers use it as it is."""
    resize_embeddings: Literal["never", "auto"] = "never"
    """`auto`: where a loaded model's embeddings have fewer rows than the tokenizer has ids, add rows at the mean of the
    old ones. `never`: refuse such a pair."""
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=65536)] = 64
    """`resizeEmbeddings` makes the number of rows a multiple of this."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *MODEL_SOURCES)
