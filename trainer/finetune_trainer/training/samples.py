"""What the model answers to a few prompts, before a stage and after it."""

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
    """Greedy answers before the first step; `after` is called at the stage's end.

    Under ZeRO-3 every worker generates the same, since each layer is gathered from all of them; else the first worker
    generates and the others wait.
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
        """Record the trained model's answers."""
        self._record("after", model)

    def _record(self, when: str, model: Any) -> None:
        rank = self.context.placement.rank
        if self.prompts and (rank == 0 or self.context.zero == 3):
            answers = self._answers(model)
            rows = [{**prompt, "output": answer} for prompt, answer in zip(self.prompts, answers, strict=True)]
            if rank == 0:
                known = self._known() if when == "after" else {}
                self.storage.write_text(self.context.layout.samples, json.dumps({**known, when: rows}, indent=1))
        self.collectives.barrier()

    def _known(self) -> dict[str, Any]:
        path = self.context.layout.samples
        return dict(json.loads(self.storage.read_text(path))) if self.storage.exists(path) else {}

    def _answers(self, model: Any) -> list[str]:
        tokenizer = self.context.tokenizer
        ids = [_prompt_ids(tokenizer, prompt, room=self._room()) for prompt in self.prompts]
        options = GenerationOptions(max_new_tokens=NEW_TOKENS)
        return [completion.text.strip() for completion in generate_batch(model, tokenizer, ids, options)]

    def _room(self) -> int:
        return max(1, (context_length(self.context.config) or 4096) - NEW_TOKENS)


def _prompt_ids(tokenizer: Any, prompt: dict[str, Any], room: int) -> list[int]:
    if "messages" in prompt and has_template(tokenizer):
        return encode(tokenizer, [prompt["messages"]], tools=prompt.get("tools"))[0][-room:]
    text = prompt.get("prompt") or "\n\n".join(message["content"] for message in prompt["messages"])
    return encode(tokenizer, [text], raw=True)[0][-room:]
