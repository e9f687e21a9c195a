"""The commands `chat`, `generate` and `init`, run from a shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from finetune_api.job import FineTuneJob
from finetune_cli.prompt_files import read_prompts
from finetune_cli.repl import Chat
from finetune_cli.starter import job_name, starter_files
from finetune_trainer.errors import UserError
from finetune_trainer.generation.generate import generate
from finetune_trainer.generation.load import Loaded, load
from finetune_trainer.generation.options import GenerationOptions

SHORT = GenerationOptions(max_new_tokens=5)


def finetune(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a subprocess."""
    program = "from finetune_cli.main import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def loaded(llama_dir: Path) -> Loaded:
    return load(str(llama_dir), device="cpu")


@pytest.fixture
def chat(loaded: Loaded) -> Chat:
    return Chat(loaded, SHORT, Console(highlight=False, soft_wrap=True))


def test_a_piped_chat_prints_answers_alone(loaded: Loaded, llama_dir: Path) -> None:
    done = finetune("chat", llama_dir, "--max-new-tokens", 5, "--device", "cpu", stdin="Return\n/exit\nJoin\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == generate(loaded, ["Return"], SHORT)[0] + "\n"
    assert done.stderr == ""


def test_a_chat_remembers_and_forgets(chat: Chat, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = chat.answer("Return"), chat.answer("the value")
    turns = [("user", "Return"), ("assistant", first), ("user", "the value")]
    dialogue = [{"role": role, "content": content} for role, content in turns]
    assert generate(loaded, [dialogue], SHORT) == [second]
    assert chat.command("/reset")
    assert chat.answer("Return") == first
    assert first in capsys.readouterr().out


def test_a_system_message_is_used_and_saved(chat: Chat, loaded: Loaded, tmp_path: Path) -> None:
    chat.command("/system Be kind.")
    said = chat.answer("Return")
    assert said == generate(loaded, ["Return"], GenerationOptions(max_new_tokens=5, system="Be kind."))[0]
    chat.command(f"/save {tmp_path / 'talk.jsonl'}")
    [row] = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]


def test_commands_that_fail_say_why(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.command("/save x")
    chat.answer("Return")
    for line in ("/sytem x", "/save", f"/save {tmp_path / 'no' / 'dir'}"):
        assert chat.command(line)
    errors = capsys.readouterr().err
    assert "the conversation is empty" in errors
    assert "unknown command /sytem: did you mean `/system`?" in errors
    assert "/save needs a file name" in errors
    assert "No such file or directory" in errors
    assert not chat.command("/exit")


def test_ctrl_c_stops_the_answer_not_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is simulated with a KeyboardInterrupt while a piece is printed."""
    printed: list[str] = []

    def interrupted(*pieces: str, **_: object) -> None:
        printed.extend(pieces)
        if len(printed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.console, "print", interrupted)
    said = chat.answer("Return")
    assert chat.history[-1] == {"role": "assistant", "content": said}
    assert printed[1] == " ..."


def test_a_full_context_leaves_the_conversation_as_it_was(chat: Chat) -> None:
    with pytest.raises(UserError, match="leave no room"):
        chat.answer("a" * 200)
    assert chat.history == []


def test_one_prompt_is_answered_and_left(loaded: Loaded, llama_dir: Path) -> None:
    done = finetune("chat", llama_dir, "--prompt", "Return", "--max-new-tokens", 5, "--device", "cpu")
    assert done.stdout == generate(loaded, ["Return"], SHORT)[0] + "\n"


def test_generate_answers_a_file_as_json_lines(loaded: Loaded, llama_dir: Path, tmp_path: Path) -> None:
    dialogue = [{"role": "user", "content": "Join"}, {"role": "assistant", "content": "left out"}]
    rows = [{"prompt": "Return"}, {"messages": dialogue}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--prompts", tmp_path / "p.jsonl", "--json", "--max-new-tokens", 5, "--batch-size", 1)
    done = finetune("generate", llama_dir, "--prompt", "a", *arguments, "--device", "cpu")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    prompts = ["a", "Return", dialogue[:1]]
    assert answers == [
        {"prompt": prompt, "answer": answer}
        for prompt, answer in zip(prompts, generate(loaded, prompts, SHORT), strict=True)
    ]


def test_generate_fills_masks(masked_dir: Path) -> None:
    done = finetune("generate", masked_dir, "--prompt", "a <mask> b", "--json", "--device", "cpu")
    assert len(json.loads(done.stdout)["masks"][0]) == 5


def test_wrong_options_exit_with_2(llama_dir: Path) -> None:
    done = finetune("generate", llama_dir, "--prompt", "a", "--temperature", 0, "--num-beams", 3)
    assert done.returncode == 2
    assert "error: temperature: got 0.0" in done.stderr
    assert "error: num_beams: got 3 with do_sample" in done.stderr


def test_bad_prompt_rows_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "ok"}\n\n{"question": "x"}\nnot json\n')
    with pytest.raises(UserError) as error:
        read_prompts([], tmp_path / "p.jsonl")
    assert [problem.path.rpartition(":")[2] for problem in error.value.problems] == ["3", "4"]


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(["zero"], tmp_path / "p.txt") == ["zero", "one", "two"]
    with pytest.raises(UserError, match="no prompt: set"):
        read_prompts([], None)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_init_writes_a_valid_job_and_its_data(tmp_path: Path, from_scratch: bool) -> None:
    target = tmp_path / "My Job_2.yaml"
    written = starter_files(target, from_scratch=from_scratch)
    job = FineTuneJob.model_validate(yaml.safe_load(written[target]))
    assert job.metadata.name == "my-job-2"
    sources = [source for stage in job.spec.stages for source in stage.spec.data.sources]
    assert {tmp_path / str(source.file) for source in sources} == set(written) - {target}


def test_the_starters_commented_stages_are_valid_too(tmp_path: Path) -> None:
    lines = starter_files(tmp_path / "a.yaml")[tmp_path / "a.yaml"].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  stages:"))
    block = [line.replace("# ", "", 1) for line in lines[start:] if line.startswith("    # ") and "uri:" not in line]
    stages = yaml.safe_load("\n".join(block))
    document = yaml.safe_load("\n".join(lines))
    document["spec"]["stages"] = stages
    kinds = [stage.kind for stage in FineTuneJob.model_validate(document).spec.stages]
    assert kinds == ["pretrain", "dpo"]


def test_init_does_not_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "job.yaml"
    assert finetune("init", target, "--no-data").returncode == 0
    target.write_text("mine")
    refused = finetune("init", target)
    assert (refused.returncode, target.read_text()) == (2, "mine")
    assert "--force" in refused.stderr
    assert finetune("init", target, "--force").returncode == 0
    assert target.read_text() != "mine"


@pytest.mark.parametrize(
    ("stem", "name"), [("job", "job"), ("2 Ünder_Score", "nder-score"), ("---", "my-first-job"), ("a" * 50, "a" * 40)]
)
def test_job_names_are_valid(stem: str, name: str) -> None:
    assert job_name(stem) == name
