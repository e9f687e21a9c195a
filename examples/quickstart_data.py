"""Training data from text that every Python ships: `python quickstart_data.py [DIRECTORY]`.

Writes four files of JSON lines, always the same ones for one Python version:

- `corpus.jsonl` — `{text}`: docstrings of the standard library and its language reference, to pretrain on;
- `questions.jsonl` — `{messages}`: «What does `os.path.join` do?» with the first sentence of the docstring;
- `held-out.jsonl` — the same form: the same functions in words that `questions.jsonl` does not ask about them in;
- `preferences.jsonl` — `{prompt, chosen, rejected}`: the right sentence against another function's or a broken one.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]
Docs = dict[str, str]

CORPUS_MODULES = (
    "builtins", "bisect", "collections", "copy", "datetime", "fnmatch", "functools", "glob", "heapq", "itertools",
    "json", "math", "operator", "os", "os.path", "random", "re", "shutil", "statistics", "string", "textwrap", "time",
)  # fmt: skip
"""Modules that do nothing when imported."""

QUESTION_MODULES = ("builtins",)
"""Modules whose functions are asked about: few enough that a tiny model can know them all."""

QUESTION_TYPES = (str, list)
"""Built-in types whose methods are asked about too."""

WORDINGS = (
    "What does `{name}` do?",
    "What does {name} do?",
    "What is {name} for?",
    "What is `{name}` good for?",
    "Explain {name}.",
    "Explain `{name}` to me.",
    "Tell me about `{name}`.",
    "Describe {name} in one sentence.",
)
"""Every function is asked about in all of these but one, which is held out and is another one for the next function."""

UNSEEN_WORDING = "I met {name} in some code. What does it do?"
"""Held out for every function."""

MIN_ANSWER, MAX_ANSWER = 15, 90
_ABBREVIATIONS = ("e.g.", "eg.", "i.e.", "a.k.a.", "etc.")
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)(\s*->.*)?$")


def main() -> None:
    """Write the files and say how many rows each has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "quickstart-data"
    parser.add_argument("directory", nargs="?", type=Path, default=default, help=f"default: {default}")
    directory = parser.parse_args().directory
    for name, count in write(directory).items():
        print(f"{directory / name}: {count} rows")


def write(directory: Path) -> dict[str, int]:
    """Write all files into `directory`, made if need be; the number of rows by file name."""
    directory.mkdir(parents=True, exist_ok=True)
    # What is made here is made again at will: keep it out of the repository, as virtual environments do.
    (directory / ".gitignore").write_text("*\n")
    tables = build()
    for name, rows in tables.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / name).write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in tables.items()}


def build() -> dict[str, list[Row]]:
    """The rows of each file.

    Raises:
        SystemExit: Python runs without docstrings (`-OO`).
    """
    if sys.flags.optimize > 1:
        raise SystemExit("quickstart_data.py reads docstrings, which `python -OO` strips: run it without -OO")
    answers = question_answers()
    return {
        "corpus.jsonl": [{"text": text} for text in corpus()],
        "questions.jsonl": [_conversation(*pair) for pair in questions(answers)],
        "held-out.jsonl": [_conversation(*pair) for pair in held_out(answers)],
        "preferences.jsonl": list(preferences(answers)),
    }


def corpus() -> list[str]:
    """Docstrings, each under its name, and the language reference; no text twice."""
    documents = [f"{name}\n\n{doc}" for module in CORPUS_MODULES for name, doc in _docs(module).items()]
    topics: Docs = importlib.import_module("pydoc_data.topics").topics
    return list(dict.fromkeys(documents + [topics[name].strip() for name in sorted(topics)]))


def question_answers() -> Docs:
    """Name of each function that is asked about → first sentence of its docstring; no sentence twice."""
    docs: Docs = {}
    for module in QUESTION_MODULES:
        docs |= _function_docs(importlib.import_module(module), _prefix(module))
    for kind in QUESTION_TYPES:
        docs |= _function_docs(kind, f"{kind.__name__}.")
    answers: Docs = {}
    for name, doc in docs.items():
        sentence = first_sentence(doc)
        if MIN_ANSWER <= len(sentence) <= MAX_ANSWER and sentence not in answers.values():
            answers[name] = sentence
    return answers


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring, signature lines left out; empty where it has none."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", doc)]
    prose = next((part for part in paragraphs if not _SIGNATURE.match(part)), "")
    sentence = re.split(r"(?<=[.!?])\s", prose, maxsplit=1)[0]
    return sentence if sentence.endswith(".") and not sentence.endswith(_ABBREVIATIONS) else ""


def questions(answers: Docs) -> Iterator[tuple[str, str]]:
    """(question, answer) of every function in every wording but its held-out one."""
    for index, (name, answer) in enumerate(answers.items()):
        for number, wording in enumerate(WORDINGS):
            if number != index % len(WORDINGS):
                yield wording.format(name=name), answer


def held_out(answers: Docs) -> Iterator[tuple[str, str]]:
    """(question, answer) of every function in its held-out wording and in the one no function is trained on."""
    for index, (name, answer) in enumerate(answers.items()):
        yield WORDINGS[index % len(WORDINGS)].format(name=name), answer
        yield UNSEEN_WORDING.format(name=name), answer


def preferences(answers: Docs, seed: int = 0) -> Iterator[Row]:
    """Two pairs per function: against another function's answer, and against its own cut in the middle."""
    chance = random.Random(seed)
    sentences = list(answers.values())
    for question, answer in questions(answers):
        if chance.random() < 2 / (len(WORDINGS) - 1):
            other = chance.choice([sentence for sentence in sentences if sentence != answer])
            rejected = other if chance.random() < 0.5 else _cut(answer)
            yield {"prompt": [_turn("user", question)], "chosen": [_turn("assistant", answer)],
                   "rejected": [_turn("assistant", rejected)]}  # fmt: skip


def _cut(answer: str) -> str:
    words = answer.split()
    return " ".join(words[: max(1, len(words) // 2)])


def _conversation(question: str, answer: str) -> Row:
    return {"messages": [_turn("user", question), _turn("assistant", answer)]}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _prefix(module: str) -> str:
    return "" if module == "builtins" else f"{module}."


def _docs(module_name: str) -> Docs:
    """Docstrings of a module, its functions, its classes and their methods, by full name."""
    module = importlib.import_module(module_name)
    prefix = _prefix(module_name)
    docs = {module_name: inspect.getdoc(module) or ""} | _function_docs(module, prefix)
    for name, kind in _public(module):
        if inspect.isclass(kind) and _defined_in(kind, module):
            docs[prefix + name] = inspect.getdoc(kind) or ""
            docs |= _function_docs(kind, f"{prefix}{name}.")
    return {name: doc for name, doc in docs.items() if doc}


def _function_docs(owner: ModuleType | type, prefix: str) -> Docs:
    found = ((name, value) for name, value in _public(owner) if inspect.isroutine(value))
    return {prefix + name: doc for name, value in found if (doc := value.__doc__ and inspect.getdoc(value))}


def _public(owner: ModuleType | type) -> Iterable[tuple[str, Any]]:
    """Public members, sorted by name; of a class only its own, of a module only what it offers."""
    offered = getattr(owner, "__all__", None) or vars(owner)
    return [(name, getattr(owner, name, None)) for name in sorted(offered) if not name.startswith("_")]


def _defined_in(kind: type, module: ModuleType) -> bool:
    return kind.__module__ in (module.__name__, f"_{module.__name__}")


if __name__ == "__main__":
    main()
