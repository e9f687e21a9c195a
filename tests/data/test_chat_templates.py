"""Which tokens of a conversation are trained on, for the chat templates of many model families."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.data.chat_cases import (
    CONVERSATIONS,
    TEMPLATES,
    TOOL_TEMPLATES,
    TOOLS,
    TRL_TEMPLATES,
    Messages,
    talk,
    tokenizer_for,
)
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.report import Stats
from finetune_trainer.generation.prompts import stop_ids

ALL = {**{f"own-{name}": text for name, text in {**TEMPLATES, **TOOL_TEMPLATES}.items()}, **TRL_TEMPLATES}
ALTERNATE = {"cohere", "cohere2", "gemma", "gemma3"}
"""Templates that require user and assistant turns to alternate, starting with the user."""
WITHOUT_CALLS = {"idefics3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"}
"""Templates that do not render tool calls."""
LAYOUT = re.compile(
    r"<[^<>\s]*>|\s|final|to=(?:user|self|functions\.weather|weather)|commentary|json|assistant|function|thought"
    r"|```|call:|\[|\]|tool_name|tool_call_id"
)
"""What a template may add to an answer: special tokens, and the names of a channel or of a tool call."""
WORDS = re.compile(r"[UARST](?:alpha|beta|gamma|delta|same|sigma|zeta|sunny|one|two|g|d)\b")


def _encoded(tokenizer: PreTrainedTokenizerFast, messages: Messages, **more: Any) -> tuple[dict[str, Any], Stats]:
    stats = Stats()
    rows = list(Encoder(tokenizer, Encoding("sft", None)).rows([(0, {"messages": messages, **more})], stats))
    return {name: values.tolist() for name, values in (rows or [{}])[0].items()}, stats


def _runs(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the (start, end) positions of each run of trained tokens."""
    trains = [label != -100 for label in row["labels"]] + [False]
    starts = [at for at, one in enumerate(trains) if one and (not at or not trains[at - 1])]
    return [(start, trains.index(False, start)) for start in starts]


def _texts(tokenizer: PreTrainedTokenizerFast, messages: Messages, **more: Any) -> list[str]:
    row, stats = _encoded(tokenizer, messages, **more)
    assert not stats.faults, stats.faults
    return [tokenizer.decode(row["input_ids"][start:end]) for start, end in _runs(row)]


def _refused(name: str, kind: str) -> bool:
    if kind == "tools":
        return name in {*ALTERNATE, *WITHOUT_CALLS, "llava_next"} or (name[:4] == "own-" and name[4:] in TEMPLATES)
    if kind == "assistant-first":
        return name in ALTERNATE
    return kind == "system" and name in {"gemma", "own-mistral"}


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL)
def test_the_answers_and_their_ends_train_and_nothing_else(name: str, kind: str) -> None:
    tokenizer, messages = tokenizer_for(ALL[name]), CONVERSATIONS[kind]
    tools = {"tools": TOOLS} if kind == "tools" else {}
    row, stats = _encoded(tokenizer, messages, **tools)
    if _refused(name, kind):
        assert len(stats.faults) == 1
        return
    assert not stats.faults, stats.faults
    answers, runs = [message for message in messages if message["role"] == "assistant"], _runs(row)
    assert len(runs) == len(answers)
    for message, (start, end) in zip(answers, runs, strict=True):
        said = tokenizer.decode(row["input_ids"][start:end])
        answer = message["content"].rpartition("</think>")[2].strip()
        assert answer in said
        assert all(word in {answer, "Tone", "Ttwo"} for word in WORDS.findall(said)), said
        if not message.get("tool_calls"):
            assert not re.sub(r"Tone|Ttwo", "", LAYOUT.sub("", said.replace(answer, "", 1))), said
        elif "Rome" not in said:
            raise AssertionError(f"the call is not in {said!r}")
    rest = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert not re.search(r"A(?:beta|delta|same|zeta|d\b)", tokenizer.decode(rest))


UNENDED = {"own-alpaca": 1, "own-vicuna": 0}
"""Number of answers before the last one that no stop token ends, by template."""


@pytest.mark.parametrize("name", ALL)
def test_each_answer_ends_with_a_token_that_stops_generation(name: str) -> None:
    tokenizer = tokenizer_for(ALL[name])
    row, stats = _encoded(tokenizer, CONVERSATIONS["turns"])
    *_, last = ends = [row["input_ids"][end - 1] for _, end in _runs(row)]
    assert last in stop_ids(tokenizer, None)
    unended = sum(end not in tokenizer.added_tokens_decoder for end in ends)
    assert unended == UNENDED.get(name, 0)
    assert [note.partition(":")[0] for note in stats.notes] == ["answers that no stop token ends"][:unended]


@pytest.mark.parametrize("kind", ["turns", "system", "thoughts"])
@pytest.mark.parametrize("name", ALL)
def test_an_answer_follows_the_tokens_of_the_prompt_that_inference_has(name: str, kind: str) -> None:
    tokenizer = tokenizer_for(ALL[name])
    messages = CONVERSATIONS[kind][: 3 if kind == "system" else 2]
    if _refused(name, kind) or name == "own-code-llama":  # its prompt has text that no conversation has
        return
    row, _ = _encoded(tokenizer, messages)
    prompt = Encoder(tokenizer, Encoding("sft", None)).prompt_ids(messages[:-1])
    if kind == "thoughts" and name in ("own-think-closed", "qwen3_5_nothink"):  # the prompt closes an empty thought
        prompt = prompt[: prompt.index(tokenizer.convert_tokens_to_ids("<think>"))]
    assert row["input_ids"][: _runs(row)[-1][0]] == prompt


EXPECTED = {
    "chatml": ["4<|im_end|>", "6<|im_end|>"],
    "default-system": ["4<|im_end|>", "6<|im_end|>"],
    "no-prompt": ["<|im_start|>assistant\n4<|im_end|>", "<|im_start|>assistant\n6<|im_end|>"],
    "marked-no-end": ["4<|im_end|>", "6<|im_end|>"],
    "marked-wide": ["4<|im_end|>", "6<|im_end|>"],
    "mistral": [" 4</s>", " 6</s>"],
    "mistral3": [" 4</s>", " 6</s>"],
    "llama2": [" 4 </s>", " 6 </s>"],
    "vicuna": [" 4</s>", " 6</s>"],
    "alpaca": ["4", "6</s>"],
    "glm": ["4<|user|>", "6<|user|>"],
    "metharme": ["4<|user|>", "6</s>"],
    "phi3": ["4<|end|>", "6<|end|>"],
    "command": ["4<|/answer|><|end|>", "6<|/answer|><|end|>"],
    "code-llama": ["4 <|step|>", "6 <|step|>"],
    "think": ["4<|im_end|>", "\n</think>\n\n6<|im_end|>"],
    "think-dropped": ["4<|im_end|>", "\n</think>\n\n6<|im_end|>"],
    "think-last": ["4<|im_end|>", "<think>\n\n</think>\n\n6<|im_end|>"],
    "think-closed": ["4<|im_end|>", "6<|im_end|>"],
    "parts": [" 4<|im_end|>", " 6<|im_end|>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trained_text_of_each_family(name: str) -> None:
    messages = talk(("user", "2 and 2?"), ("assistant", "4"), ("user", "3 and 3?"), ("assistant", "6"))
    assert _texts(tokenizer_for(TEMPLATES[name]), messages) == EXPECTED[name]


def test_a_thought_follows_the_one_that_the_prompt_opens() -> None:
    row = talk(("user", "2 and 2?"), ("assistant", "<think>\nadd them\n</think>\n\n4"))
    for name in ("think", "think-dropped"):
        assert _texts(tokenizer_for(TEMPLATES[name]), row) == ["add them\n</think>\n\n4<|im_end|>"]
    assert _texts(tokenizer_for(TEMPLATES["think-last"]), row) == ["<think>\nadd them\n</think>\n\n4<|im_end|>"]
    drawn = talk(("user", "2 and 2?"), ("assistant", "add them\n</think>\n\n4"))  # after the prompt's `<think>`
    assert _texts(tokenizer_for(TEMPLATES["think"]), drawn) == ["add them\n</think>\n\n4<|im_end|>"]


def test_a_default_system_message_and_the_first_header_carry_no_loss() -> None:
    messages = talk(("assistant", "Hi, can I help?"), ("user", "2 and 2?"), ("assistant", "4"))
    tokenizer = tokenizer_for(TEMPLATES["default-system"])
    assert _texts(tokenizer, messages) == ["Hi, can I help?<|im_end|>", "4<|im_end|>"]
    stats = Stats()
    rows = Encoder(tokenizer, Encoding("sft", None)).rows([(0, {"prompt": [], "completion": messages[:1]})], stats)
    (row,) = ({name: values.tolist() for name, values in row.items()} for row in rows)
    assert [tokenizer.decode(row["input_ids"][start:end]) for start, end in _runs(row)] == ["Hi, can I help?<|im_end|>"]
    pair = {"prompt": [], "chosen": messages[:1], "rejected": talk(("assistant", "Go away."))}
    (row,) = Encoder(tokenizer, Encoding("preference", None)).rows([(0, pair)], stats)
    assert tokenizer.decode(row["prompt_ids"]).endswith("Default.<|im_end|>\n<|im_start|>assistant\n")
    assert row["chosen_mask"].tolist() == [1] * (len(row["chosen_ids"]) - 1) + [0]  # the line break at the end


def test_an_answer_that_spells_its_end_has_one() -> None:
    messages = talk(("user", "<s>2 and 2?"), ("assistant", "4</s>"))
    tokenizer = tokenizer_for(TEMPLATES["mistral"])
    assert _texts(tokenizer, messages) == [" 4</s>"]
    assert _encoded(tokenizer, messages)[0]["input_ids"].count(tokenizer.bos_token_id) == 1
    assert _texts(tokenizer_for(TEMPLATES["chatml"]), talk(("user", "a"), ("assistant", "b<|im_end|>"))) == [
        "b<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}",
            "changes the text",
        ),
        ("{{ messages[-1]['role'] + ': ' + messages[-1]['content'] }}", "changes the text of message 1"),
        ("{% for m in messages[::-1] %}{{ m['role'] + m['content'] | reverse }}{% endfor %}", "message 1 (assistant)"),
    ],
)
def test_what_can_not_be_told_is_refused_with_the_reason(template: str, why: str) -> None:
    _, stats = _encoded(tokenizer_for(template), CONVERSATIONS["turns"])
    ((_, reason),) = stats.faults
    assert why in reason


def _masked(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], side: str) -> str:
    return tokenizer.decode([token for token, one in zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True) if one])


@pytest.mark.parametrize("name", ["chatml", "marked-no-end", "mistral", "think"])
def test_turns_that_are_not_to_train_carry_no_loss(name: str) -> None:
    """No template may render the `train` key either, even one that prints whole messages."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    turns = talk(("user", "Ualpha"), ("assistant", "Abeta"), ("user", "Ugamma"), ("assistant", "Adelta"))
    turns[1]["train"] = False
    (said,) = _texts(tokenizer, turns)
    assert "Adelta" in said and "Abeta" not in said
    encoder, stats = Encoder(tokenizer, Encoding("sft", None)), Stats()
    (row,) = encoder.rows([(0, {"prompt": turns[:1], "completion": turns[1:]})], stats)
    trained = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert "Adelta" in trained and "Abeta" not in trained
    pair = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [*turns[1:3], *talk(("assistant", "Azeta"))]}
    (row,) = Encoder(tokenizer, Encoding("preference", None)).rows([(0, pair)], stats)
    assert "Abeta" not in _masked(tokenizer, row, "chosen") and "Adelta" in _masked(tokenizer, row, "chosen")
    assert "Abeta" not in _masked(tokenizer, row, "rejected") and "Azeta" in _masked(tokenizer, row, "rejected")
    turns[3]["train"] = False
    _, stats = _encoded(tokenizer, turns)
    assert stats.dropped == {"no assistant turn": 1} and not stats.faults


def test_no_template_sees_the_key_of_turns_that_are_not_to_train() -> None:
    template = "{% for m in messages %}{{ m.keys() | join('+') + m['content'] + '<|im_end|>' }}{% endfor %}"
    turns = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns[1]["train"] = False
    row, _ = _encoded(tokenizer_for(template), turns)
    assert "train" not in tokenizer_for(template).decode(row["input_ids"])
