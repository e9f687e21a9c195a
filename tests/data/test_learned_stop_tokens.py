"""A model trained on prepared rows stops after its answer, whatever token its chat template ends an answer with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.data.chat_cases import TEMPLATES, Messages, talk, tokenizer_for
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.report import Stats
from finetune_trainer.generation.batches import Completion, generate_batch
from finetune_trainer.generation.options import GenerationOptions


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, which is faster for a model of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROW = talk(("user", "2 and 2?"), ("assistant", "It is 4."), ("user", "3 and 3?"), ("assistant", "It is 6."))


def _answers(tokenizer: PreTrainedTokenizerFast, conversations: list[Messages]) -> list[Completion]:
    """Train a tiny model on the conversations and return its answers to the two questions of `ROW`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    examples = [(at, {"messages": messages}) for at, messages in enumerate(conversations)]
    encoded = Encoder(tokenizer, Encoding("sft", None)).rows(examples, Stats())
    rows = [{name: torch.tensor(values.tolist())[None] for name, values in row.items()} for row in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for row in rows:
            model(**row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return generate_batch(model, tokenizer, [ROW[:1], ROW[:3]], GenerationOptions(max_new_tokens=40))


@pytest.mark.parametrize("name", ["marked-no-end", "glm", "metharme", "alpaca"])
def test_a_trained_model_stops_after_its_answer(name: str) -> None:
    first, second = _answers(tokenizer_for(TEMPLATES[name]), [ROW, ROW[:2]])
    assert second.finished and second.text.endswith("It is 6.")
    if name != "alpaca":  # no stop token ends its first answer
        assert first.finished and first.text.endswith("It is 4.")


def test_an_answer_without_a_thought_is_learned_where_prompts_open_one() -> None:
    tokenizer = tokenizer_for(TEMPLATES["think"])
    first, _ = _answers(tokenizer, [ROW[:2]])
    assert first.finished and first.text == "\n</think>\n\nIt is 4."
