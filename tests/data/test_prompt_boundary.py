"""Where the prompt ends in rows whose answers are conversations that may repeat the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.data.data_cases import dpo, inline, made
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_trainer.data.row_formats import EmptyRow, FormError, normalise
from finetune_trainer.errors import UserError

SYSTEM, OTHER = {"role": "system", "content": "Be terse."}, {"role": "system", "content": "Rhyme."}
ASK, MORE = {"role": "user", "content": "What is 2+2?"}, {"role": "user", "content": "And 3+3?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
SIX, NINE = {"role": "assistant", "content": "6"}, {"role": "assistant", "content": "9"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "4"}
SPACED = {"role": "user", "content": "What is 2+2? \n"}
SILENT = {**FOUR, "train": False}
Chat = list[dict[str, Any]]


def read(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return normalise(row, DataSpec.model_validate({"sources": [{"inline": [row]}], **fields}), "preference")


@pytest.mark.parametrize(
    ("asked", "chosen", "rejected", "expected"),
    [
        ("What is 2+2?", [SYSTEM, ASK, FOUR], [SYSTEM, ASK, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ("What is 2+2?", [ASK, FOUR], [ASK, FIVE], ([ASK], [FOUR], [FIVE])),
        ("And 3+3?", [ASK, FOUR, MORE, SIX], [ASK, FOUR, MORE, NINE], ([ASK, FOUR, MORE], [SIX], [NINE])),
        ("What is 2+2?", [ASK, FOUR, MORE, SIX], [ASK, FOUR, MORE, NINE], ([ASK, FOUR, MORE], [SIX], [NINE])),
        (" What is  2+2?\n", [SPACED, FOUR], [ASK, FIVE], ([SPACED], [FOUR], [FIVE])),
        ("Be terse.\n\nWhat is 2+2?", [SYSTEM, ASK, FOUR], [SYSTEM, ASK, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ("\n\nHuman: What is 2+2?\n\nAssistant:", [ASK, FOUR], [ASK, FIVE], ([ASK], [FOUR], [FIVE])),
        ("What is 2+2?", [FOUR], [FIVE], ([ASK], [FOUR], [FIVE])),
        ("What is 2+2?", FOUR, FIVE, ([ASK], [FOUR], [FIVE])),
        ("What is 2+2?", {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}, ([ASK], [FOUR], [FIVE])),
        ("What is 2+2?", [SYSTEM, FOUR], [SYSTEM, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ("What is 2+2?", [CALL, RESULT, FOUR], [CALL, RESULT, FIVE], ([ASK, CALL, RESULT], [FOUR], [FIVE])),
        ("", [ASK, FOUR], [ASK, FIVE], ([ASK], [FOUR], [FIVE])),
        (None, [SYSTEM, ASK, FOUR], [SYSTEM, ASK, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        (None, [ASK, CALL, RESULT, FOUR], [ASK, CALL, RESULT, FIVE], ([ASK, CALL, RESULT], [FOUR], [FIVE])),
        (None, [ASK, FOUR, MORE, SIX], [ASK, FOUR, ASK, NINE], ([ASK], [SILENT, MORE, SIX], [SILENT, ASK, NINE])),
        (None, [ASK, FOUR], [ASK, FOUR, MORE, NINE], ([ASK], [FOUR], [FOUR, MORE, NINE])),
        (None, [ASK, {**FOUR, "weight": 0}, MORE, SIX], [ASK, FOUR, MORE, NINE], ([ASK, FOUR, MORE], [SIX], [NINE])),
        ([ASK], [FOUR], [FIVE], ([ASK], [FOUR], [FIVE])),
        ([ASK], "4", "5", ([ASK], [FOUR], [FIVE])),
        ([ASK], [ASK, FOUR], [ASK, FIVE], ([ASK], [FOUR], [FIVE])),
        ([ASK], [SPACED, FOUR], [ASK, FIVE], ([SPACED], [FOUR], [FIVE])),
        ([ASK], [SYSTEM, ASK, FOUR], [SYSTEM, ASK, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ([SYSTEM, ASK], [ASK, FOUR], [ASK, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ([SYSTEM, ASK], [SYSTEM, FOUR], [SYSTEM, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ([SYSTEM], [ASK, FOUR], [ASK, FIVE], ([SYSTEM, ASK], [FOUR], [FIVE])),
        ([MORE], [ASK, FOUR, MORE, SIX], [ASK, FOUR, MORE, NINE], ([ASK, FOUR, MORE], [SIX], [NINE])),
        ([ASK, FOUR], [MORE, SIX], [MORE, NINE], ([ASK, FOUR, MORE], [SIX], [NINE])),
        ([ASK, CALL, RESULT], [FOUR], [FIVE], ([ASK, CALL, RESULT], [FOUR], [FIVE])),
        ([ASK, FOUR], [ASK, FOUR, FIVE], [ASK, FOUR, SIX], ([ASK, FOUR], [FIVE], [SIX])),
    ],
)
def test_a_prompt_is_there_once(asked: Any, chosen: Any, rejected: Any, expected: tuple[Chat, Chat, Chat]) -> None:
    example = read({"prompt": asked, "chosen": chosen, "rejected": rejected})
    assert (example["prompt"], example["chosen"], example["rejected"]) == expected


@pytest.mark.parametrize("asked", [None, "What is 2+2?"])
@pytest.mark.parametrize("head", [[ASK], [SYSTEM, ASK], [ASK, CALL, RESULT], [SYSTEM, ASK, FOUR, MORE]])
def test_the_prompt_is_what_trl_extracts(asked: str | None, head: Chat) -> None:
    from trl.data_utils import maybe_extract_prompt

    row = {"chosen": [*head, SIX], "rejected": [*head, NINE]} | ({"prompt": asked} if asked else {})
    assert {name: value for name, value in read(row).items() if name != "templated"} == maybe_extract_prompt(row)


@pytest.mark.parametrize(
    ("asked", "chosen", "rejected", "reason"),
    [
        ("What is 5+5?", [ASK, FOUR], [ASK, FIVE], r"`prompt` asks 'What is 5\+5\?', but .* asks 'What is 2\+2\?'"),
        ("Answer tersely. What is 2+2?", [ASK, FOUR], [ASK, FIVE], r"columns: {prompt: none}"),
        ([MORE], [ASK, FOUR], [ASK, FIVE], r"`prompt` asks 'And 3\+3\?', but .* asks 'What is 2\+2\?'"),
        ([OTHER, ASK], [SYSTEM, ASK, FOUR], [SYSTEM, ASK, FIVE], "different system messages, 'Rhyme.' and 'Be terse.'"),
        ("x", "4", [FIVE], "`chosen` is a string and `rejected` a list"),
    ],
)
def test_contradictions_are_told(asked: Any, chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(FormError, match=reason):
        read({"prompt": asked, "chosen": chosen, "rejected": rejected})


def test_pairs_without_a_shared_prompt_are_left_out() -> None:
    for row in (
        {"chosen": [FOUR], "rejected": [FIVE]},
        {"chosen": [ASK, FOUR], "rejected": [MORE, FIVE]},
        {"chosen": [SYSTEM, ASK, FOUR], "rejected": [SYSTEM, MORE, FIVE]},
        {"prompt": "x", "chosen": [SYSTEM, ASK, FOUR], "rejected": [SYSTEM, MORE, FIVE]},
    ):
        with pytest.raises(EmptyRow, match="no shared prompt"):
            read(row)
    with pytest.raises(EmptyRow, match="empty"):
        read({"prompt": "x", "chosen": [], "rejected": [FIVE]})


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": [ASK], "completion": [ASK, FOUR]}, [ASK], [FOUR]),
        ({"prompt": "What is 2+2?", "completion": [SYSTEM, ASK, FOUR]}, [SYSTEM, ASK], [FOUR]),
        ({"prompt": "And 3+3?", "completion": [ASK, FOUR, MORE, SIX]}, [ASK, FOUR, MORE], [SIX]),
        ({"prompt": [ASK], "completion": [ASK, FOUR, MORE, SIX]}, [ASK], [FOUR, MORE, SIX]),
        ({"prompt": [MORE], "completion": [ASK, FOUR, MORE, SIX]}, [ASK, FOUR, MORE], [SIX]),
        ({"prompt": "What is 2+2?", "completion": FOUR}, [ASK], [FOUR]),
        ({"prompt": [ASK], "completion": "4"}, [ASK], [FOUR]),
    ],
)
def test_a_completion_may_repeat_its_prompt(row: dict[str, Any], prompt: Chat, completion: Chat) -> None:
    spec = DataSpec.model_validate({"sources": [{"inline": [row]}]})
    assert normalise(row, spec, "sft") == {"prompt": prompt, "completion": completion}
    asked = normalise(row, spec, "prompt")
    assert (asked["prompt"], asked["columns"]) == (prompt, {"reference": completion[0]["content"]})


def test_prompts_of_pairs() -> None:
    """The prompt for generation is the same as the prompt in preference training."""
    row = {"prompt": "What is 2+2?", "chosen": [SYSTEM, ASK, FOUR], "rejected": [SYSTEM, ASK, FIVE]}
    example = normalise(row, DataSpec.model_validate({"sources": [{"inline": [row]}]}), "prompt")
    assert example["prompt"] == [SYSTEM, ASK] and example["columns"]["reference"] == "4"


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"messages": [ASK, FOUR], "system": "Be terse."}, {}, [SYSTEM, ASK, FOUR]),
        ({"messages": [SYSTEM, ASK, FOUR], "system": "Be terse. "}, {}, [SYSTEM, ASK, FOUR]),
        ({"messages": [ASK, FOUR], "system": ""}, {}, [ASK, FOUR]),
        ({"messages": [ASK, FOUR], "rules": "Be terse."}, {"columns": {"system": "rules"}}, [SYSTEM, ASK, FOUR]),
        (
            {"messages": [ASK, FOUR], "system": "x", "rules": "Be terse."},
            {"template": {"system": "{rules}"}},
            [SYSTEM, ASK, FOUR],
        ),
    ],
)
def test_system_columns(row: dict[str, Any], fields: dict[str, Any], expected: Chat) -> None:
    spec = DataSpec.model_validate({"sources": [{"inline": [row]}], **fields})
    assert normalise(row, spec, "sft") == {"messages": expected}


def test_strings_with_a_system_column_are_turns() -> None:
    """Such rows become messages, with `templated` set; otherwise the system message would be lost."""
    row = {"prompt": "What is 2+2?", "completion": "4", "system": "Be terse."}
    spec = DataSpec.model_validate({"sources": [{"inline": [row]}]})
    expected = {"prompt": [SYSTEM, ASK], "completion": [FOUR], "templated": True}
    assert normalise(row, spec, "sft") == expected
    assert normalise(row, spec, "prompt")["prompt"] == [SYSTEM, ASK]
    pair = {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5", "system": ""}
    assert read(pair) == {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE], "templated": True}
    with pytest.raises(
        FormError, match=r"two system messages, 'Rhyme.' in its messages and 'Be terse.' in its own column"
    ):
        normalise({"messages": [OTHER, ASK, FOUR], "system": "Be terse."}, spec, "sft")
    with pytest.raises(FormError, match=r"`system` is a number, expected a string: set `columns: {system: none}`"):
        normalise({"messages": [ASK, FOUR], "system": 3}, spec, "sft")


def test_rendered_pairs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The case dpo-system-in-chosen, with a template that puts a default system message before a user's turn."""
    default = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert isinstance(tokenizer.chat_template, str)
    default.chat_template = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nDefault.<|im_end|>\n' }}{% endif %}"
        + tokenizer.chat_template
    )
    rows = [{"prompt": "What is 2+2?", "chosen": [SYSTEM, ASK, FOUR], "rejected": [SYSTEM, ASK, FIVE]}]
    row = made(dpo(inline(rows)), default, tmp_path).train[0]
    asked = "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert default.decode(row["prompt_ids"]) == asked
    assert default.decode(row["chosen_ids"]).strip() == "4<|im_end|>"
    with pytest.raises(UserError, match=r"sources\[0\]: row 0: `prompt` asks 'What is 2\+3\?'"):
        made(dpo(inline([{**rows[0], "prompt": "What is 2+3?"}])), default, tmp_path)
