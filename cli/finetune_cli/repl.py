"""A conversation on a terminal, or with questions from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from finetune_api.problems import did_you_mean
from finetune_trainer.errors import UserError
from finetune_trainer.generation.generate import stream
from finetune_trainer.generation.load import Loaded
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import Conversation, has_template

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT: set the system message and forget the conversation; without TEXT take it away",
    "/save": "FILE: append the conversation to FILE as one JSON line, in the form that `sft` trains on",
    "/help": "this list",
    "/exit": "leave (so does Ctrl-D)",
}


class Chat:
    """The conversation so far and the model that answers.

    A model without a chat template, or that was trained on plain text, has no turns: each line is continued on its own.

    Args:
        raw: see `generation.generate`.
    """

    def __init__(
        self, loaded: Loaded, options: GenerationOptions, console: Console | None = None, raw: bool | None = None
    ) -> None:
        if loaded.kind != "causal":
            raise UserError("this model fills masks: use `finetune generate --prompt 'text with the mask token'`")
        self.loaded = loaded
        self.options = options
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.history: Conversation = []
        self.raw = raw
        self.turns = has_template(loaded.tokenizer) and not (loaded.asks_plainly if raw is None else raw)

    def run(self) -> None:
        """Answer line after line until the end of the input or `/exit`."""
        for line in self._lines():
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                self._say(line)

    def answer(self, text: str) -> str:
        """Print the answer as it comes, and remember both. Ctrl-C ends the answer; what was said stays.

        Raises:
            UserError: the conversation fills the model's context; it is left as it was.
        """
        turn = {"role": "user", "content": text}
        asked = [*self.history, turn] if self.turns else text
        pieces = stream(self.loaded, asked, self.options, raw=self.raw)
        said = "".join(self._print(pieces))
        if self.turns:
            self.history += [turn, {"role": "assistant", "content": said}]
        return said

    def command(self, line: str) -> bool:
        """Carry out a `/command`; False if it was the last."""
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/save": self._save, "/help": self._help,
        }  # fmt: skip
        if name in actions:
            actions[name](argument.strip())
        else:
            self._note(f"unknown command {name}{did_you_mean(name, COMMANDS)}")
        return True

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from (line.strip() for line in sys.stdin)
            return
        import readline  # noqa: F401  # importing it gives input() its line editing

        self._note("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                yield self.console.input("[bold cyan]> [/]").strip()
            except KeyboardInterrupt:
                self._note("\n(/exit or Ctrl-D leaves)")
            except EOFError:
                return

    def _say(self, text: str) -> None:
        try:
            self.answer(text)
        except UserError as error:
            self._note(f"{error}; /reset forgets the conversation")

    def _print(self, pieces: Iterator[str]) -> Iterator[str]:
        with closing(pieces):  # type: ignore[type-var]  # `stream` is a generator
            try:
                for piece in pieces:
                    yield piece
                    self.console.print(piece, end="", markup=False)
                    self.console.file.flush()
            except KeyboardInterrupt:
                self.console.print(" …", end="", style="dim")
        self.console.print()

    def _reset(self, _: str = "") -> None:
        self.history = []
        self._note("the conversation is forgotten")

    def _system(self, text: str) -> None:
        if not self.turns:
            self._note("this model continues plain text, which has no system message")
            return
        self.options = replace(self.options, system=text or None)
        self._reset()

    def _save(self, name: str) -> None:
        if not name or not self.history:
            self._note("/save needs a file name" if self.history else "nothing was said yet")
            return
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n")
        except OSError as error:
            self._note(f"can't write {name}: {error.strerror}")
            return
        self._note(f"saved to {name}")

    def _messages(self) -> Conversation:
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        return system + self.history

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            self._note(f"{name:8} {meaning}")

    def _note(self, text: str) -> None:
        """A line that is not the model's: on standard error where answers may be piped on."""
        if self.console.is_terminal:
            self.console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
