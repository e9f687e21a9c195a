"""How text is generated, under the names of transformers' `GenerationConfig` in camelCase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, rules

StopText = Annotated[str, Field(min_length=1, max_length=64)]

SAMPLING_RULE: Json = cel(
    "self.doSample || !(has(self.temperature) || has(self.topP) || has(self.topK))",
    "temperature, topP and topK change sampling: set doSample",
)
BEAMS_RULE: Json = cel("!self.doSample || self.numBeams == 1", "choose beam search (numBeams) or sampling (doSample)")


class Generation(ApiModel):
    """Greedy decoding, unless a field says otherwise."""

    model_config = rules(SAMPLING_RULE, BEAMS_RULE)

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Most tokens of one answer."""
    do_sample: bool = False
    """Draw each token by its probability (true), or take the likeliest one (false)."""
    temperature: Annotated[float, Field(gt=0, le=100, json_schema_extra={"minimum": 0})] | None = None
    """Divides the logits before sampling. Default: 1."""
    top_p: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] | None = None
    """Sample among the likeliest tokens that together have this probability. Default: all."""
    top_k: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Sample among so many of the likeliest tokens. Default: all."""
    num_beams: Annotated[int, Field(ge=1, le=128)] = 1
    """Beams of beam search; 1 is none."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100, json_schema_extra={"minimum": 0})] = 1.0
    """Divides the scores of tokens that occurred; 1 is none."""
    stop: Annotated[list[StopText], Field(max_length=16)] = Field(default=[])
    """Texts that end an answer, beside the end of text and the end of a turn; they are no part of it."""

    def faults(self) -> Iterator[str]:
        sampling = {"temperature": self.temperature, "topP": self.top_p, "topK": self.top_k}
        given = [name for name, value in sampling.items() if value is not None]
        if given and not self.do_sample:
            yield f"{' and '.join(given)} without doSample: only sampling uses it"
        if self.do_sample and self.num_beams > 1:
            yield "choose beam search (numBeams) or sampling (doSample)"
