"""What the model answers to a few prompts, before a stage and after it."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.generation.prompts import stop_ids
from finetune_trainer.model.load import context_length
from finetune_trainer.storage import Storage
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.peers import Peers

NEW_TOKENS = 64


class SamplesCallback(TrainerCallback):
    """Greedy answers before the first step; `after` is called at the stage's end.

    Under ZeRO-3 every worker generates the same, since each layer is gathered from all of them; else the first worker
    generates and the others wait.
    """

    def __init__(self, context: StageContext, storage: Storage, prompts: list[dict[str, Any]], peers: Peers) -> None:
        self.context, self.storage, self.prompts, self.peers = context, storage, prompts, peers

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
            rows = [{**prompt, "output": self._answer(model, prompt)} for prompt in self.prompts]
            if rank == 0:
                known = self._known() if when == "after" else {}
                self.storage.write_text(self.context.layout.samples, json.dumps({**known, when: rows}, indent=1))
        self.peers.wait()

    def _known(self) -> dict[str, Any]:
        path = self.context.layout.samples
        return dict(json.loads(self.storage.read_text(path))) if self.storage.exists(path) else {}

    def _answer(self, model: Any, prompt: dict[str, Any]) -> str:
        tokenizer = self.context.tokenizer
        ids = _prompt_ids(tokenizer, prompt, room=self._room()).to(model.device)
        training = model.training
        model.eval()
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                eos_token_id=stop_ids(tokenizer, None),
                pad_token_id=tokenizer.pad_token_id,
            )
        model.train(training)
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _room(self) -> int:
        return max(1, (context_length(self.context.config) or 4096) - NEW_TOKENS)


def _prompt_ids(tokenizer: Any, prompt: dict[str, Any], room: int) -> torch.Tensor:
    if "messages" in prompt:
        text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    else:
        text = prompt["prompt"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][-room:]
    return torch.tensor([ids])
