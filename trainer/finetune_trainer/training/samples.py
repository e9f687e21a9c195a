"""Records completions of a few prompts before and after a stage."""

from __future__ import annotations

import json
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.generation.batches import generate_batch
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import encode, has_template
from finetune_trainer.model.config import context_length
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext

NEW_TOKENS = 64


class SamplesCallback(TrainerCallback):
    """Records greedy completions before the first step, and at the end of the stage by `after`.

    Under ZeRO-3 every worker generates the same completions, because each layer is gathered from all workers; otherwise
    rank 0 generates and the others wait.
    """

    def __init__(
        self, context: StageContext, storage: Storage, prompts: list[dict[str, Any]], collectives: Collectives
    ) -> None:
        self.context, self.storage, self.prompts, self.collectives = context, storage, prompts, collectives

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step == 0:
            self._record("before", model)

    def after(self, model: Any) -> None:
        """Record the completions of the trained model."""
        self._record("after", model)

    def _record(self, when: str, model: Any) -> None:
        rank = self.context.placement.rank
        if self.prompts and (rank == 0 or self.context.zero == 3):
            texts = self._completions(model)
            rows = [{**prompt, "output": text} for prompt, text in zip(self.prompts, texts, strict=True)]
            if rank == 0:
                recorded = self._recorded() if when == "after" else {}
                self.storage.write_text(self.context.layout.samples, json.dumps({**recorded, when: rows}, indent=1))
        self.collectives.barrier()

    def _recorded(self) -> dict[str, Any]:
        path = self.context.layout.samples
        return dict(json.loads(self.storage.read_text(path))) if self.storage.exists(path) else {}

    def _completions(self, model: Any) -> list[str]:
        tokenizer = self.context.tokenizer
        ids = [_prompt_ids(tokenizer, prompt, self._max_prompt_length()) for prompt in self.prompts]
        options = GenerationOptions(max_new_tokens=NEW_TOKENS)
        return [completion.text.strip() for completion in generate_batch(model, tokenizer, ids, options)]

    def _max_prompt_length(self) -> int:
        return max(1, (context_length(self.context.config) or 4096) - NEW_TOKENS)


def _prompt_ids(tokenizer: Any, prompt: dict[str, Any], max_length: int) -> list[int]:
    if "messages" in prompt and has_template(tokenizer):
        return encode(tokenizer, [prompt["messages"]], tools=prompt.get("tools"))[0][-max_length:]
    text = prompt.get("prompt") or "\n\n".join(message["content"] for message in prompt["messages"])
    return encode(tokenizer, [text], raw=True)[0][-max_length:]
