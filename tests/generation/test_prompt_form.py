"""A model is prompted in the format that it was trained on: with the chat template, or as plain text."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

from finetune_cli.chat import form_note
from finetune_cli.main import app
from finetune_cli.repl import Chat
from finetune_trainer.errors import UserError
from finetune_trainer.form import Form, form_of, main_form, read_form, write_form
from finetune_trainer.generation.generate import generate
from finetune_trainer.generation.load import Loaded, load
from finetune_trainer.generation.merge import merge
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import encode

SHORT = GenerationOptions(max_new_tokens=6)
PROMPT = "Return"
CHAT = [{"role": "user", "content": PROMPT}]


def trained_as(form: Form, model: Path, directory: Path) -> Path:
    """Return a copy of the model that records the format it was trained on."""
    copy = Path(shutil.copytree(model, directory / form))
    write_form(copy, "sft", {form: 12})
    return copy


@pytest.fixture
def plain(llama_dir: Path, tmp_path: Path) -> Loaded:
    """Load a model with a chat template that was trained on prompts and completions."""
    return load(str(trained_as("prompt-completion", llama_dir, tmp_path)), "cpu")


def test_a_plainly_trained_model_is_asked_plainly(plain: Loaded) -> None:
    as_text, as_chat = generate(plain, [PROMPT], SHORT, raw=True), generate(plain, [PROMPT], SHORT, raw=False)
    assert as_text != as_chat
    assert generate(plain, [PROMPT], SHORT) == as_text
    assert generate(plain, [CHAT], SHORT) == as_chat, "a conversation has no other way"


@pytest.mark.parametrize("form", ["chat", None])
def test_any_other_model_is_asked_in_chats(form: Form | None, llama_dir: Path, tmp_path: Path) -> None:
    loaded = load(str(trained_as(form, llama_dir, tmp_path) if form else llama_dir), "cpu")
    assert loaded.form == form
    assert generate(loaded, [PROMPT], SHORT) == generate(loaded, [CHAT], SHORT, raw=False)


def test_what_needs_a_chat_says_how_to_get_one(plain: Loaded) -> None:
    with pytest.raises(UserError, match=r"system: needs a chat, but the model was trained on plain text \(--chat asks"):
        generate(plain, [PROMPT], GenerationOptions(system="Be kind."))
    with pytest.raises(UserError, match=r"prompts\[0\]: is a conversation, but raw continues plain text"):
        generate(plain, [CHAT], SHORT, raw=True)


def test_a_chat_with_a_plainly_trained_model_has_no_turns(plain: Loaded) -> None:
    console = Console(file=io.StringIO())
    chat = Chat(plain, SHORT, console)
    assert chat.answer(PROMPT) == generate(plain, [PROMPT], SHORT, raw=True)[0] and chat.history == []
    chat = Chat(plain, SHORT, console, raw=False)
    assert chat.answer(PROMPT) == generate(plain, [CHAT], SHORT)[0] and len(chat.history) == 2


def test_one_line_says_how_it_is_asked(plain: Loaded, llama_dir: Path, plain_dir: Path, tmp_path: Path) -> None:
    trained = "trained on prompts and completions as plain text"
    assert form_note(plain, None) == f"{trained}: prompts are used without the chat template; --chat applies it"
    assert form_note(plain, False) == f"{trained}, but prompted with the chat template: answers may be worse"
    assert form_note(plain, True) is None
    chat = load(str(trained_as("chat", llama_dir, tmp_path)), "cpu")
    assert form_note(chat, None) is None and "but prompted without the chat template" in str(form_note(chat, True))
    assert form_note(load(str(llama_dir), "cpu"), True) is None, "how it was trained is not known"
    with pytest.raises(UserError, match="--chat: the tokenizer has no chat template"):
        form_note(load(str(plain_dir), "cpu"), False)


def test_the_commands_say_it_beside_the_answer(plain: Loaded, tmp_path: Path) -> None:
    result = tmp_path / "prompt-completion"
    for command in ("generate", "chat"):
        arguments = [command, str(result), "--prompt", PROMPT, "--max-new-tokens", "6", "--device", "cpu"]
        done = CliRunner().invoke(app, arguments)
        assert done.stdout == generate(plain, [PROMPT], SHORT)[0] + "\n", done.output
        assert f"{form_note(plain, None)}\n" in done.stderr


def test_a_merged_adapter_is_asked_as_the_adapter_is(job_dir: Path, tmp_path: Path) -> None:
    write_form(job_dir / "stages/02-sft/result", "sft", {"text": 1})
    merge(str(job_dir), tmp_path / "merged")
    assert read_form(tmp_path / "merged") == load(str(job_dir), "cpu").form == "text"


def test_a_text_begins_as_in_training_and_does_not_end(llama_dir: Path) -> None:
    """The tokenizer would also add an EOS token to the text."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir, bos_token="<|im_start|>")
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|endoftext|>")]
    single = "<|im_start|> $A <|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer(PROMPT)["input_ids"][-1] == eos
    (ids,) = encode(tokenizer, [PROMPT], raw=True)
    assert ids[0] == bos and ids[1] != bos and ids[-1] != eos
    assert encode(tokenizer, ["<|im_start|>Return"], raw=True) == [ids]


def test_the_form_of_rows() -> None:
    turn = [{"role": "user", "content": "x"}]
    assert form_of({"text": "x"}, True) == "text"
    assert form_of({"messages": turn}, True) == form_of({"prompt": turn, "completion": turn}, True) == "chat"
    assert form_of({"prompt": "x", "completion": "y"}, True) == "prompt-completion"
    templated = {"prompt": turn, "completion": turn, "templated": True}
    assert form_of(templated, True) == "chat" and form_of(templated, False) == "prompt-completion"
    assert main_form({"text": 90, "chat": 10}) == "chat" and main_form({"text": 2, "prompt-completion": 3}) != "text"
    assert main_form({}) is None


@pytest.mark.parametrize("content", ["", "[]", '{"trainedAs": "songs"}', '{"trainedAs": ["chat"]}'])
def test_a_file_that_is_not_ours_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "finetune.json").write_text(content)
    assert read_form(tmp_path) is None
