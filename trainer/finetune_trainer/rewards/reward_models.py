"""Reward models as reward functions, which score a completion as the `reward` stage scores its pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from finetune_api.problems import Problem
from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.template import Tools
from finetune_trainer.errors import UserError
from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.config import context_length, load_tokenizer, read_config
from finetune_trainer.model.load import load_whole, on_device
from finetune_trainer.model.reward_score import read_at_last_token, special_ids_in_texts
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import auto_class

BATCH = 16


class RewardModel:
    """A model that outputs one score, whole on this worker.

    The score is read at the last token of prompt and completion, as in the `reward` stage. If the padding token of a
    model is a token with which its texts end, the model was trained to be read where transformers reads it, at the
    token before, and is read there.

    Args:
        model: in evaluation mode, on its device.
        name: the name in metrics.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        self.model, self.tokenizer, self.__name__ = model, tokenizer, name
        self.limit = context_length(model.config)
        pad = model.config.get_text_config().pad_token_id
        if pad is None or pad not in special_ids_in_texts(tokenizer):
            read_at_last_token(model)
        self.pad = 0 if pad is None else int(pad)
        self.encoder = Encoder(tokenizer, Encoding("preference", None))

    def __call__(
        self, prompts: list[Any], completions: list[Any], tools: list[Tools] | None = None, **_: Any
    ) -> list[float | None]:
        pairs = zip(prompts, completions, tools or [None] * len(prompts), strict=True)
        ids = [self.encoder.whole(*pair)[: self.limit] for pair in pairs]
        scores: list[float | None] = []
        for start in range(0, len(ids), BATCH):
            scores += self._scores(ids[start : start + BATCH])
        return scores

    @torch.inference_mode()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self.pad)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        found: list[float] = output.logits[:, 0].float().tolist()
        return found


def load_reward_model(source: str, name: str, dtype: torch.dtype, device: torch.device, where: str) -> RewardModel:
    """Return the reward model in a directory or of a hub id.

    Args:
        where: the field that names it.

    Raises:
        UserError: the model does not exist, does not output exactly one score, or its checkpoint lacks weights.
        Outage: the hub does not answer.
    """
    tokenizer = load_tokenizer(ModelSource(source, None, None, source), where)
    config = read_config(source, where=where)
    if config.num_labels != 1:
        message = f"{source!r} outputs {config.num_labels} scores, expected one: it is not a reward model"
        raise UserError([Problem(where, message)])
    try:
        with undivided_loading():
            model = load_whole(source, auto_class("reward"), config=config, device=device, dtype=dtype)
    except UserError as error:
        raise UserError([Problem(where, problem.message) for problem in error.problems]) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError([Problem(where, f"no reward model at {source!r}: {reason}")]) from error
    return RewardModel(on_device(model, device).eval(), tokenizer, name)
