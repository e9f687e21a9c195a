"""Settings of an OpenAI-compatible chat completions endpoint, used as a teacher or a judge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, expects

BaseUrl = Annotated[
    str,
    Field(
        max_length=2048,
        pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$",
        json_schema_extra=expects("an http(s) URL without a user name, such as `http://vllm:8000/v1`"),
    ),
]
VariableName = Annotated[
    str,
    Field(
        max_length=256,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra=expects("the NAME of an environment variable, not the key itself"),
    ),
]
Price = Annotated[float, Field(ge=0, le=1e6)]


class Endpoint(ApiModel):
    """An OpenAI-compatible server (OpenAI, vLLM, SGLang, Ollama, llama.cpp)."""

    base_url: BaseUrl
    """Base URL; requests go to `<baseUrl>/chat/completions`."""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the model on that server."""
    api_key_env: VariableName | None = None
    """Name of the environment variable that holds the API key (on a cluster from `kubernetes.envFromSecrets`).
    Default: no key is sent."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Maximum number of concurrent requests."""
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Maximum number of requests per minute, evenly spaced. Default: no limit."""
    tokens_per_minute: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    """Maximum number of tokens per minute. A request counts with its estimated prompt and its longest possible answer.
    Default: no limit."""
    timeout_seconds: Annotated[float, Field(gt=0, le=86400, json_schema_extra={"minimum": 0})] = 120
    """Timeout of a request in seconds. The request is then retried."""
    max_retries: Annotated[int, Field(ge=0, le=1000)] = 20
    """Maximum number of retries of a request after a server error, a lost connection, a timeout or an invalid response.
    Responses with status 429 do not count."""
    response_format: Literal["auto", "jsonObject", "text"] = "auto"
    """Whether structured answers are requested with OpenAI's JSON mode. `auto`: yes, until the server rejects it."""
    extra_body: dict[str, Any] = Field(default={}, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
    """Additional fields of each request, such as `{top_k: 20}` for vLLM."""
    prompt_price: Price | None = None
    """Price of a million prompt tokens, in any currency. Default: costs are not reported."""
    completion_price: Price | None = None
    """Price of a million completion tokens. Default: costs are not reported."""
