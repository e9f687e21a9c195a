"""Tools, tool calls and results appear in every rendered text, in the format of the template's family."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.data.chat_cases import (
    CALL,
    CONVERSATIONS,
    TEMPLATES,
    TOOL_TEMPLATES,
    TOOLS,
    TRL_TEMPLATES,
    Messages,
    talk,
    tokenizer_for,
)
from support.data.data_cases import inline, made, sft
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.prompts import prompt_of
from finetune_trainer.data.report import Stats
from finetune_trainer.data.summary import data_line
from finetune_trainer.generation.prompts import encode
from finetune_trainer.rewards.reward_models import RewardModel
from finetune_trainer.training.answers import prompt_row
from finetune_trainer.training.samples import _prompt_ids

ROW = {"messages": CONVERSATIONS["tools"], "tools": TOOLS}
ARGUMENTS = {"city": "Rome", "days": 2, "note": 'a "b"', "null": None, "deep": {"x": [1, 2]}}


def _text(tokenizer: PreTrainedTokenizerFast, example: dict[str, Any], kind: Any = "sft") -> str:
    stats = Stats()
    rows = list(Encoder(tokenizer, Encoding(kind, None)).rows([(0, example)], stats))
    assert not stats.faults, stats.faults
    return tokenizer.decode(rows[0]["input_ids"])


def _asked(arguments: dict[str, Any]) -> Messages:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [dict(message) for message in CONVERSATIONS["tools"]]
    messages[1]["tool_calls"] = [call]
    return messages


@pytest.mark.parametrize("name", ["objects", "both", "strings", "printed", "null", "inside"])
def test_arguments_are_json_once(name: str) -> None:
    text = _text(tokenizer_for(TOOL_TEMPLATES[name]), {"messages": _asked(ARGUMENTS), "tools": TOOLS})
    assert text.count(json.dumps(ARGUMENTS)) == 1, text
    assert repr(ARGUMENTS) not in text and json.dumps(json.dumps(ARGUMENTS))[1:-1] not in text


def test_arguments_that_a_template_goes_through_are_objects() -> None:
    text = _text(tokenizer_for(TOOL_TEMPLATES["items"]), {"messages": _asked({"city": "Rome"}), "tools": TOOLS})
    assert '<tool_call>weather city="Rome"</tool_call>' in text


WITH_JSON = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "llama3_1", "llama3_2", "gptoss", "deepseekv3")


@pytest.mark.parametrize("name", WITH_JSON)
def test_arguments_in_templates_of_real_models(name: str) -> None:
    """In training, TRL may replace the template with its own version, which may expect another type of arguments."""
    tokenizer, messages = tokenizer_for(TRL_TEMPLATES[name]), _asked({"city": "Rome", "days": 2})
    trained = _text(tokenizer, {"messages": messages, "tools": TOOLS})
    asked = tokenizer.decode(encode(tokenizer, [messages[:-1]], tools=TOOLS)[0])
    for text in (trained, asked):
        assert text.count('{"city": "Rome", "days": 2}') == 1, text


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_calls_that_a_template_leaves_out_are_refused(name: str) -> None:
    stats = Stats()
    assert not list(Encoder(tokenizer_for(TEMPLATES[name]), Encoding("sft", None)).rows([(0, ROW)], stats))
    assert "does not write tool calls" in stats.faults[0][1] or "Only user and assistant" in stats.faults[0][1]


def test_results_that_a_template_leaves_out_are_refused() -> None:
    template = TOOL_TEMPLATES["objects"].replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    stats = Stats()
    assert not list(Encoder(tokenizer_for(template), Encoding("sft", None)).rows([(0, ROW)], stats))
    assert "does not write the results of tools" in stats.faults[0][1]


def test_tools_that_a_template_leaves_out_are_told(tmp_path: Path) -> None:
    """As in TRL's SFT, tools that a template does not render are no error: the conversation may still be right."""
    messages = talk(("user", "Hello"), ("assistant", "Hi"))
    stats = Stats()
    rows = [(0, {"messages": messages, "tools": TOOLS}), (1, {"messages": messages})]
    assert len(list(Encoder(tokenizer_for(TEMPLATES["chatml"]), Encoding("sft", None)).rows(rows, stats))) == 2
    assert stats.notes == {"`tools` that the chat template does not write": 1}
    report = made(sft(inline([{"messages": messages}] * 2)), tokenizer_for(TEMPLATES["alpaca"]), tmp_path).report
    assert not report.notes
    talked = inline([{"messages": messages * 2}] * 2)
    report = made(sft(talked), tokenizer_for(TEMPLATES["alpaca"]), tmp_path).report
    assert report.notes == {"answers that no stop token ends: the model does not learn to stop after them": 2}
    assert "2 with answers that no stop token ends" in data_line(report)


def test_tools_are_in_every_render(tmp_path: Path) -> None:
    """Training, pairs, rollout prompts, evaluation, rewards and generation all render the same tokens."""
    tokenizer, messages = tokenizer_for(TOOL_TEMPLATES["objects"]), CONVERSATIONS["tools"]
    prompt, answer = messages[:-1], messages[-1:]
    whole = _text(tokenizer, ROW)
    assert '"description": "Tell the weather."' in whole
    encoder = Encoder(tokenizer, Encoding("sft", None))
    asked = encoder.prompt(ROW)
    assert whole.startswith(tokenizer.decode(asked)) and "Tell the weather." in tokenizer.decode(asked)
    assert encode(tokenizer, [prompt], tools=TOOLS)[0] == asked
    assert _prompt_ids(tokenizer, prompt_of(ROW) or {}, max_length=10_000) == asked
    assert _text(tokenizer, {"prompt": prompt, "completion": answer, "tools": TOOLS}) == whole
    assert tokenizer.decode(encoder.whole(prompt, answer, TOOLS)) == whole
    stats = Stats()
    pair = {"prompt": prompt, "chosen": answer, "rejected": talk(("assistant", "no")), "tools": TOOLS}
    (row,) = Encoder(tokenizer, Encoding("preference", None)).rows([(0, pair)], stats)
    assert row["prompt_ids"].tolist() == asked
    rollout = {"prompt": prompt, "columns": {"id": 3}, "tools": TOOLS}
    (row,) = Encoder(tokenizer, Encoding("prompt", None)).rows([(0, rollout)], stats)
    read = prompt_row({**row, "prompt_ids": row["prompt_ids"].tolist()})
    assert read.ids == asked and read.fields == {"id": 3, "tools": TOOLS} and read.columns == {"id": 3}
    assert not stats.faults


def test_a_reward_model_reads_the_tools_of_a_row() -> None:
    tokenizer, seen = tokenizer_for(TOOL_TEMPLATES["objects"]), list[list[int]]()

    class Model:
        config = SimpleNamespace(max_position_embeddings=4096, pad_token_id=None, get_text_config=lambda: Model.config)

    reward = RewardModel(Model(), tokenizer, "reward")
    reward._scores = lambda rows: seen.extend(rows) or [0.0] * len(rows)  # type: ignore[method-assign, func-returns-value]
    prompt, answer = CONVERSATIONS["tools"][:-1], CONVERSATIONS["tools"][-1:]
    reward([prompt, prompt], [answer, answer], tools=[TOOLS, None])
    reward([prompt], [answer])
    texts = [tokenizer.decode(ids) for ids in seen]
    assert ["Tell the weather." in text for text in texts] == [True, False, False]
