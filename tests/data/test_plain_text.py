"""Plain text gets one BOS and one EOS token, even if it already contains them, in training and in generation."""

from __future__ import annotations

from typing import Any

import pytest
from support.data.chat_cases import TEMPLATES, talk, tokenizer_for
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.report import Stats
from finetune_trainer.generation.prompts import encode

FRAMES = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}
"""The special tokens that a tokenizer adds around a text."""


def _tokenizer(frame: str, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_for(template)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    single = FRAMES[frame]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=special
    )
    return tokenizer


def _row(tokenizer: PreTrainedTokenizerFast, example: dict[str, Any], kind: Any = "sft") -> dict[str, list[int]]:
    stats = Stats()
    (row,) = Encoder(tokenizer, Encoding(kind, None)).rows([(0, example)], stats)
    assert not stats.faults
    return {name: values.tolist() for name, values in row.items() if not isinstance(values, str)}


@pytest.mark.parametrize("spelled", ["hi hello", "<s>hi hello", "hi hello</s>", "<s>hi hello</s>"])
@pytest.mark.parametrize("frame", FRAMES)
def test_one_of_each_however_a_text_spells_them(frame: str, spelled: str) -> None:
    tokenizer = _tokenizer(frame)
    begins = frame in ("bos", "both") or spelled.startswith("<s>")
    expected = ("<s>" if begins else "") + "hi hello</s>"
    prompt, answer = spelled.split(" ")
    assert tokenizer.decode(_row(tokenizer, {"text": spelled})["input_ids"]) == expected
    row = _row(tokenizer, {"prompt": prompt, "completion": f" {answer}"})
    assert tokenizer.decode(row["input_ids"]) == expected
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " hello</s>"
    pair = _row(tokenizer, {"prompt": prompt, "chosen": f" {answer}", "rejected": " no"}, "preference")
    assert tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"]) == expected
    assert tokenizer.decode(pair["rejected_ids"]) == " no</s>"
    (document,) = Encoder(tokenizer, Encoding("text", 8)).documents([spelled])
    assert tokenizer.decode(document) == expected
    asked = _row(tokenizer, {"prompt": prompt, "columns": {}}, "prompt")["prompt_ids"]
    assert tokenizer.decode(asked) == ("<s>" if begins else "") + "hi"
    assert encode(tokenizer, [prompt], raw=True) == [asked] and row["input_ids"][: len(asked)] == asked


@pytest.mark.parametrize("name", ["mistral", "llama2"])
@pytest.mark.parametrize("frame", FRAMES)
def test_one_of_each_where_template_and_tokenizer_both_write_them(frame: str, name: str) -> None:
    tokenizer = _tokenizer(frame, TEMPLATES[name])
    messages = talk(("user", "hi"), ("assistant", "hello"))
    ids = _row(tokenizer, {"messages": messages})["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    (asked,) = encode(tokenizer, [messages[:1]])
    assert ids[: len(asked)] == asked and asked.count(tokenizer.bos_token_id) == 1


def test_a_text_of_nothing_but_its_end() -> None:
    assert _tokenizer("both").decode(_row(_tokenizer("both"), {"text": "<s></s>"})["input_ids"]) == "<s></s>"
