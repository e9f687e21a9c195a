"""Generation settings: fields of transformers' `GenerationConfig` in camelCase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, rules

StopText = Annotated[str, Field(min_length=1, max_length=64)]

SAMPLING_RULE: Json = cel(
    "self.doSample || !(has(self.temperature) || has(self.topP) || has(self.topK))",
    "temperature, topP and topK need doSample: true",
)
BEAMS_FAULT = "numBeams above 1 (beam search) excludes doSample (sampling)"
BEAMS_RULE: Json = cel("!self.doSample || self.numBeams == 1", BEAMS_FAULT)


class Generation(ApiModel):
    """Generation settings. The defaults select greedy decoding."""

    model_config = rules(SAMPLING_RULE, BEAMS_RULE)

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Maximum number of tokens of one answer."""
    do_sample: bool = False
    """Sample each token from the predicted distribution (true), or take the most likely token (false)."""
    temperature: Annotated[float, Field(gt=0, le=100, json_schema_extra={"minimum": 0})] | None = None
    """Sampling temperature: the logits are divided by it. Default: 1."""
    top_p: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] | None = None
    """Sample only from the most likely tokens whose probabilities add up to this value. Default: all tokens."""
    top_k: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Sample only from this many of the most likely tokens. Default: all tokens."""
    num_beams: Annotated[int, Field(ge=1, le=128)] = 1
    """Number of beams of beam search. 1: no beam search."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100, json_schema_extra={"minimum": 0})] = 1.0
    """Penalty on the scores of tokens that have occurred. 1: no penalty."""
    stop: Annotated[list[StopText], Field(max_length=16)] = Field(default=[])
    """Strings that end an answer, in addition to the end-of-text and end-of-turn tokens. The answer does not include
    them."""

    def faults(self) -> Iterator[str]:
        sampling = {"temperature": self.temperature, "topP": self.top_p, "topK": self.top_k}
        given = [name for name, value in sampling.items() if value is not None]
        if given and not self.do_sample:
            yield f"{' and '.join(given)} without doSample: set doSample: true, because greedy decoding ignores it"
        if self.do_sample and self.num_beams > 1:
            yield BEAMS_FAULT
