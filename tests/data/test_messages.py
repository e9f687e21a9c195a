"""Messages in the formats of other tools are converted to the one form that chat templates and loss masks read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.data.data_cases import inline, made, sft
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_trainer.data.messages import name_tool_role, read_messages
from finetune_trainer.data.prompts import prompt_of
from finetune_trainer.data.row_formats import FormError, normalise
from finetune_trainer.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SPEC = DataSpec.model_validate({"sources": [{"inline": [{"text": "x"}]}]})


def said(**message: Any) -> dict[str, Any]:
    """Return the normalised form of one assistant message."""
    return read_messages([{"role": "assistant", **message}], "messages")[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"content": None, "reasoning_content": "so"}, {"content": "", "reasoning_content": "so"}),
        ({"content": "x", "tool_calls": [], "function_call": None, "name": None}, {"content": "x"}),
        ({"content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]}, {"content": "Hi you"}),
        ({"content": [{"type": "output_text", "text": "Hi", "image_url": None}]}, {"content": "Hi"}),
        ({"content": [{"text": "Hi"}, " you"]}, {"content": "Hi you"}),
        ({"content": None, "function_call": CALL["function"]}, {"content": "", "tool_calls": [CALL]}),
        ({"content": "", "tool_calls": '[{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}]'}, None),
        ({"content": "", "tool_calls": [{"function": CALL["function"]}]}, None),
        ({"content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome", "unit": None}}]}, None),
        ({"content": "", "tool_calls": ['{"name": "weather", "parameters": {"city": "Rome"}}']}, None),
    ],
)
def test_an_assistants_message(given: dict[str, Any], expected: dict[str, Any] | None) -> None:
    expected = expected or {"content": "", "tool_calls": [CALL]}
    assert said(**given) == {"role": "assistant", **expected}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Rome", "unit": null}', {"city": "Rome", "unit": None}),
        ('"{\\"city\\": \\"Rome\\"}"', {"city": "Rome"}),
        ('{"text": "two\nlines"}', {"text": "two\nlines"}),
        (
            {"city": "Rome", "unit": None, "days": [1, None], "at": {"x": None}},
            {"city": "Rome", "days": [1, None], "at": {}},
        ),
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_are_an_object(arguments: Any, expected: dict[str, Any]) -> None:
    """A null in a mapping may come from Arrow and is dropped; a null in a JSON string is kept."""
    calls = said(content="", tool_calls=[{"id": "c1", "function": {"name": "f", "arguments": arguments}}])["tool_calls"]
    assert calls == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": expected}}]


def test_keys_and_roles_that_templates_read_stay() -> None:
    talk = [
        {"role": "developer", "content": "d", "name": "x"},
        {"role": "tool", "content": [{"type": "text", "text": "sunny"}], "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": {"degrees": 21, "wind": None}},
    ]
    assert read_messages(talk, "messages") == [
        talk[0],
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": '{"degrees": 21}'},
    ]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": None}, r"messages\[0\].content is empty \(null\): expected a string, text parts or `tool_calls`"),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            r"content\[0\] is a part of type `image_url`",
        ),
        (
            {"content": [{"type": "input_file", "file_id": "x"}]},
            "part of type `input_file`, but only text can be trained on",
        ),
        ({"content": [{"image": "x.png", "text": None}]}, "part of type `image`"),
        ({"content": [{"type": "thinking", "thinking": "so"}]}, "write its text as the message's `reasoning_content`"),
        ({"content": 4}, "`role` and `content` must be strings"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{city: Rome}"}}]}, "is not JSON"),
        (
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "a list, expected an object",
        ),
        ({"content": "", "tool_calls": [{"arguments": {}}]}, r"tool_calls\[0\] has no `name`"),
        ({"content": "", "tool_calls": "weather(Rome)"}, "tool_calls is a string that is not JSON"),
    ],
)
def test_messages_that_can_not_be_read(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormError, match=reason):
        said(**message)


def test_the_row_of_a_bad_message_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bad = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}
    with pytest.raises(UserError, match=r"sources\[0\]: row 1: messages\[1\].tool_calls\[0\].arguments is a string"):
        made(sft(inline([{"messages": [ASK, REPLY]}, {"messages": [ASK, bad]}])), tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"weight": None}, True),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"loss": False}, False),
        ({"weight": 0, "train": False}, False),
    ],
)
def test_keys_that_say_what_is_trained(keys: dict[str, Any], trained: bool) -> None:
    """Of these keys only `train: False` is kept, on messages without loss."""
    assert said(content="x", **keys) == {"role": "assistant", "content": "x"} | ({} if trained else {"train": False})
    shared = read_messages([{"from": "gpt", "value": "x", **keys}, {"from": "human", "value": "y", "weight": 0}], "m")
    assert shared[0].get("train", True) == trained and shared[1] == {"role": "user", "content": "y"}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"weight": 0.5}, "weight is 0.5, expected 0 or 1"),
        ({"weight": "0"}, "weight is '0', expected 0 or 1"),
        ({"loss": {"scale": 2}}, "loss is a mapping, expected 0 or 1"),
        ({"loss_weight": 1}, r"messages\[0\].loss_weight affects the loss and is not supported: write `weight: 0`"),
        ({"masked": True}, "masked affects the loss"),
        ({"training": False}, "training affects the loss"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail affects the loss"),
        ({"lossMask": [0, 1]}, "lossMask affects the loss"),
        ({"weight": 1, "train": False}, "`weight` and `train` contradict each other"),
        ({"role": "user", "weight": 1}, "weight is 1, but the message is of role 'user'"),
    ],
)
def test_keys_that_bear_on_loss_are_never_ignored(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormError, match=reason):
        said(content="x", **keys)


def test_a_prompt_never_has_the_mark() -> None:
    """Prompts have no `train` key, and an answer without loss is not used as the reference."""
    wrong = {**REPLY, "weight": 0}
    talk = normalise({"messages": [ASK, wrong, ASK, REPLY, ASK, wrong]}, SPEC, "sft")
    assert [message.get("train", True) for message in talk["messages"]] == [True, False, True, True, True, False]
    assert prompt_of(talk) == {"messages": [ASK, REPLY, ASK], "reference": "b"}
    assert normalise({"messages": [ASK, wrong, ASK]}, SPEC, "prompt")["prompt"] == [ASK, REPLY, ASK]
    pair = {"prompt": [ASK, wrong, ASK], "chosen": [wrong, ASK, REPLY], "rejected": [REPLY]}
    example = normalise(pair, SPEC, "preference")
    assert example["prompt"] == [ASK, REPLY, ASK] and example["chosen"][0] == {**REPLY, "train": False}
    assert prompt_of(example) == {"messages": [ASK, REPLY, ASK, REPLY, ASK], "reference": "b"}


SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "Weather?"},
    {"from": "gpt", "value": "I look."},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    {"from": "function_call", "value": '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}'},
    {"from": "observation", "value": "sunny"},
    {"from": "chatgpt", "value": "Sunny."},
]


def test_sharegpt() -> None:
    """Consecutive calls and the text before them become one message, like OpenAI's parallel tool calls."""
    assert read_messages(SHAREGPT, "conversations") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    with pytest.raises(FormError, match=r"\[0\].from is 'humn': did you mean `human`"):
        read_messages([{"from": "humn", "value": "x"}], "conversations")


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_roles_of_calls(role: str) -> None:
    call = {"role": role, "content": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    assert read_messages([call], "messages") == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(FormError, match=r"messages\[0\].content is a string that is not JSON"):
        read_messages([{**call, "content": "weather"}], "messages")


@pytest.mark.parametrize(
    ("template", "role", "expected"),
    [
        ("{% if message.role == 'tool' %}", "observation", "tool"),
        ("{% if message['role'] == \"tool\" %}", "function", "tool"),
        ("{% if message.role == 'tool' or message.role == 'ipython' %}", "ipython", "ipython"),
        ("{% if message.role in ['tool', 'function'] %}", "function", "function"),
        ("{% if m.role == 'observation' %}{{ tool['function'] }}", "tool", "observation"),
        ("{{ '<|' + message.role + '|>' }}", "observation", "observation"),
        ("{% if message.role == 'tool' %}", "developer", "developer"),
    ],
)
def test_results_of_tools_have_the_role_that_the_template_knows(template: str, role: str, expected: str) -> None:
    assert name_tool_role([{"role": role, "content": "x"}], template) == [{"role": expected, "content": "x"}]


def test_results_of_tools_reach_a_template_that_drops_other_roles(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Qwen2.5's template drops every message whose role it does not know."""
    template = "".join(
        f"{{% {branch} message.role == '{role}' %}}{{{{ '<|im_start|>{role} ' + message.content + '<|im_end|>' }}}}"
        for branch, role in (("if", "user"), ("elif", "assistant"), ("elif", "tool"))
    )
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    strict.chat_template = "{% for message in messages %}" + template + "{% endif %}{% endfor %}"
    strict.chat_template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    for role in ("observation", "ipython", "function", "tool"):
        rows = [{"messages": [ASK, {"role": role, "content": "sunny", "name": "weather"}, REPLY]}]
        row = made(sft(inline(rows)), strict, tmp_path).train[0]
        assert "<|im_start|>tool sunny<|im_end|>" in strict.decode(row["input_ids"])
