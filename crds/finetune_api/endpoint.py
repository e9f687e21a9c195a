"""A server that answers OpenAI-compatible chat completions: a teacher, or a judge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, expects

BaseUrl = Annotated[
    str,
    Field(
        max_length=2048,
        pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$",
        json_schema_extra=expects("an http(s) address without a user name, such as `http://vllm:8000/v1`"),
    ),
]
VariableName = Annotated[
    str,
    Field(
        max_length=256,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra=expects("the NAME of an environment variable, never a key itself"),
    ),
]
Price = Annotated[float, Field(ge=0, le=1e6)]


class Endpoint(ApiModel):
    """An OpenAI-compatible server (OpenAI, vLLM, SGLang, Ollama, llama.cpp, …)."""

    base_url: BaseUrl
    """Address that `/chat/completions` is appended to."""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The model's name on that server."""
    api_key_env: VariableName | None = None
    """Name of the environment variable that holds the API key (on a cluster from `kubernetes.envFromSecrets`).
    Default: no key is sent."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests under way at once."""
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Most requests in a minute, evenly spread. Default: as many as the server takes."""
    tokens_per_minute: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Most tokens in a minute, estimated prompt and longest answer together. Default: as many as the server takes."""
    timeout_seconds: Annotated[float, Field(gt=0, le=86400, json_schema_extra={"minimum": 0})] = 120
    """Seconds after which a request is given up and sent again."""
    max_retries: Annotated[int, Field(ge=0, le=1000)] = 20
    """How often a request is sent again after a server error, a lost connection, a timeout or an unreadable answer.
    Being asked to wait (429) does not count."""
    response_format: Literal["auto", "jsonObject", "text"] = "auto"
    """Whether structured answers are asked for by OpenAI's JSON mode. `auto`: yes, until the server refuses it."""
    extra_body: dict[str, Any] = Field(default={}, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
    """Further fields of each request, such as `{top_k: 20}` for vLLM."""
    prompt_price: Price | None = None
    """Price of a million prompt tokens, in any currency. Default: cost is not counted."""
    completion_price: Price | None = None
    """Price of a million completion tokens. Default: cost is not counted."""
