"""A reward model scores a text at its last token, including the EOS token even if that is also the padding token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.in_process import open_stage, trained
from support.jobs.plain_means import pair_means
from support.jobs.tiny_rows import TEXTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from finetune_trainer.model.reward_score import read_at_last_token, score_pad
from finetune_trainer.rewards.reward_models import load_reward_model
from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
END = "<|end|>"
CLOSE = 1e-5
PAIRS = [
    {"prompt": f"{n} plus 1", "chosen": " makes" * (1 + n % 3) + f" {n}", "rejected": f" says {n}"} for n in range(5)
]
TEXT = [pair["prompt"] + pair[side] + END for side in ("chosen", "rejected") for pair in PAIRS]


def save_base(directory: Path, special: list[str], spare_rows: int) -> None:
    """Save a Llama whose padding token is its EOS token, with `spare_rows` embedding rows beyond its vocabulary."""
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=END, pad_token=END)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    vocabulary = len(tokenizer) + spare_rows
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **ids)).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def at_the_end(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return the head's output at each text's last token, text by text."""
    ids = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
    assert all(one[0, -1] == tokenizer.eos_token_id for one in ids)
    return torch.cat([model.score(model.base_model(one).last_hidden_state[:, -1]) for one in ids])[:, 0]


@torch.no_grad()
def in_a_batch(model: Any, tokenizer: Any, texts: list[str], side: str) -> torch.Tensor:
    """Return the scores of plain transformers for the texts in one batch."""
    batch = tokenizer(texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
    scores: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    return scores


@pytest.mark.parametrize(
    ("special", "spare_rows", "pad"), [([END, "<pad>"], 0, "<pad>"), ([END], 3, "<|pad|>"), ([END], 0, None)]
)
@pytest.mark.parametrize("fields", [{}, {"lora": {"r": 2}}])
def test_pad_is_eos(
    special: list[str], spare_rows: int, pad: str | None, fields: Job, base_job: Job, tmp_path: Path
) -> None:
    """Training, evaluation, rlhf and plain transformers give the same scores.

    Without a separate padding token, transformers scores single texts and raises for a batch.
    """
    save_base(tmp_path / "model", special, spare_rows)
    data = {"sources": [{"inline": PAIRS}]}
    steps = {"maxLength": 64, "maxSteps": 2, "learningRate": 1e-2, "warmupSteps": 0, "perDeviceTrainBatchSize": 5}
    base_job["spec"]["model"] = {"path": str(tmp_path / "model")}
    base_job["spec"]["stages"] = [{"reward": {"data": data, "evalData": data, **steps, **fields}}]
    context = open_stage(base_job, tmp_path)
    with trained(context) as trainer:
        measured = trainer.evaluate()
        for side in ("left", "right"):
            found = in_a_batch(trainer.model.eval(), context.tokenizer, TEXT, side)
            torch.testing.assert_close(found, at_the_end(_inner(trainer.model), context.tokenizer, TEXT))
        save_result(trainer, context, tmp_path / "result")
    model, tokenizer = _load(tmp_path / "result")
    true = at_the_end(model, tokenizer, TEXT)
    means = pair_means(true.view(2, -1).T)
    assert {name: measured[name] for name in means} == pytest.approx(means, abs=CLOSE)
    alone = torch.cat([in_a_batch(model, tokenizer, [text], "right") for text in TEXT])
    torch.testing.assert_close(alone, true)
    _scores_in_rlhf(tmp_path / "result", true)
    assert model.config.pad_token_id == score_pad(tokenizer) == (None if pad is None else tokenizer.vocab[pad])
    for side in ("left", "right"):
        if pad is None:
            with pytest.raises(ValueError, match="no padding token"):
                in_a_batch(model, tokenizer, TEXT, side)
        else:
            torch.testing.assert_close(in_a_batch(model, tokenizer, TEXT, side), true)


def _inner(model: Any) -> Any:
    """Return the model without PEFT's wrapper, which has its own `base_model`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _load(directory: Path) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    return model, AutoTokenizer.from_pretrained(directory)


def _scores_in_rlhf(directory: Path, true: torch.Tensor) -> None:
    reward = load_reward_model(str(directory), "reward", torch.float32, torch.device("cpu"), "rewards[0].model")
    prompts, answers = zip(
        *((pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in PAIRS), strict=True
    )
    torch.testing.assert_close(torch.tensor(reward(list(prompts), list(answers))), true)


def test_a_model_from_elsewhere_is_read_where_its_configuration_says(tmp_path: Path) -> None:
    """Its padding token is its EOS token, so it was trained to score at the token before."""
    save_base(tmp_path / "model", [END], 0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.pad_token_id == tokenizer.eos_token_id
    _scores_in_rlhf(tmp_path / "model", in_a_batch(model, tokenizer, TEXT, "right"))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "bloom", "gpt_neox", "falcon", "bert"])
def test_families(family: str) -> None:
    """With a separate padding token, scores of transformers are unchanged; BERT still reads its first token."""
    fields = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    more = {"word_embed_proj_dim": 32, "intermediate_size": 32, "num_key_value_heads": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **fields, **more, num_labels=1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids, mask = torch.randint(5, 50, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, 5:], mask[1, :3] = 0, 0
    ids[mask == 0] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        read_at_last_token(model)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before)
