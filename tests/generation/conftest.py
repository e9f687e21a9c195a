"""Tiny random models, saved in the standard Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["Return the absolute value of the argument.", "Join two or more pathname components."]
CONTEXT = 96


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with ChatML's tokens, whose end of turn is not the EOS token."""
    trainer = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<mask>"]
    trainer.train_from_iterator(TEXT, vocab_size=300, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer,
        eos_token="<|endoftext|>",
        mask_token="<mask>",
        additional_special_tokens=special[1:3],
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_llama(vocabulary: int) -> LlamaForCausalLM:
    """Return a Llama whose random answers vary: the usual initialisation does not shrink its output head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a chat model."""
    directory = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model without a chat template whose generation config enables sampling."""
    directory = tmp_path_factory.mktemp("plain")
    tokenizer = make_tokenizer(chat=False)
    model = make_llama(len(tokenizer))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=7)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def masked_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a masked language model (BERT)."""
    directory = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(chat=False)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def job_dir(tmp_path: Path) -> Path:
    """Save a job directory: a pretrained model, and an adapter on it that records its absolute path."""
    job = tmp_path / "runs" / "job"
    base, adapter = job / "stages" / "01-pretrain", job / "stages" / "02-sft"
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(base / "result")
    tokenizer.save_pretrained(base / "result")
    loaded = LlamaForCausalLM.from_pretrained(base / "result")
    model = get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(adapter / "result"))
    for stage in (base, adapter):
        (stage / "done.json").write_text("{}")
    return job
