"""The command `init`: write a commented job file and sample data."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from finetune_api.job import NAME_MAX
from finetune_cli.outcome import guarded

TEMPLATE_NAME = "my-first-job"
_QUESTIONS = (
    ("What does `len` do?", "Return the number of items in a container."),
    ("What does `abs` do?", "Return the absolute value of the argument."),
    ("What does `os.path.exists` do?", "Test whether a path exists."),
)


def init_command(
    path: Annotated[
        Path, typer.Argument(metavar="[PATH]", help="The job file to write, or a directory for `job.yaml`.")
    ] = Path("job.yaml"),
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Write a pipeline for a new model: tokenizer, pretrain, sft and dpo.")
    ] = False,
    data: Annotated[
        bool, typer.Option(help="Also write small sample data files; replace them by your own data.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write a commented job file: LoRA fine-tuning of a model from the Hub on a jsonl file in the same directory."""
    guarded(lambda: _init(path, from_scratch, data, force))


def starter_files(path: Path, *, from_scratch: bool = False, data: bool = True) -> dict[Path, str]:
    """Return contents by path: the job, named after its file, and the sample data that it reads."""
    target = path if path.suffix in (".yaml", ".yml") else path / "job.yaml"
    name = job_name(target.stem)
    template = "starter-from-scratch.yaml" if from_scratch else "starter.yaml"
    text = files("finetune_cli").joinpath(template).read_text(encoding="utf-8")
    contents = {target: text.replace(TEMPLATE_NAME, name).replace("NAME.yaml", target.name)}
    if data:
        contents |= {target.parent / file: _lines(rows) for file, rows in _samples(name, from_scratch).items()}
    return contents


def job_name(stem: str) -> str:
    """Convert a string to a valid name of a job: at most 40 lower-case letters, digits and dashes, a letter first."""
    dashed = re.sub(r"[^a-z0-9]+", "-", stem.lower()).lstrip("-0123456789")[:NAME_MAX].rstrip("-")
    return dashed or TEMPLATE_NAME


def _init(path: Path, from_scratch: bool, data: bool, force: bool) -> None:
    from finetune_trainer.errors import UserError

    contents = starter_files(path, from_scratch=from_scratch, data=data)
    existing = [str(file) for file in contents if file.exists()]
    if existing and not force:
        raise UserError(f"{', '.join(existing)} already exists: choose another PATH, or use --force to overwrite")
    for file, text in contents.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from error
        print(f"wrote {file}")
    job = next(iter(contents))
    print(f"next: finetune validate {job}; finetune plan {job}; finetune run {job}")


def _samples(name: str, from_scratch: bool) -> dict[str, list[dict[str, object]]]:
    samples: dict[str, list[dict[str, object]]] = {f"{name}.jsonl": [_example(*pair) for pair in _QUESTIONS]}
    if from_scratch:
        samples["corpus.jsonl"] = [{"text": f"{question} {answer}"} for question, answer in _QUESTIONS]
        samples["preferences.jsonl"] = [_preference(index) for index in range(len(_QUESTIONS))]
    return samples


def _example(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _preference(index: int) -> dict[str, object]:
    question, answer = _QUESTIONS[index]
    return {"prompt": question, "chosen": answer, "rejected": _QUESTIONS[index - 1][1]}


def _lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
