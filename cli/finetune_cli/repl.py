"""Interactive chat on a terminal, or with prompts from a pipe."""

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
    "/reset": "start a new conversation",
    "/system": "TEXT: set the system message and start a new conversation; without TEXT, remove the system message",
    "/save": "FILE: append the conversation to FILE as one JSON line, in the format of `sft` rows",
    "/help": "list the commands",
    "/exit": "exit (or Ctrl-D)",
}


class Chat:
    """A conversation with a model.

    A model without a chat template, or one that was trained on plain text, continues each line on its own.

    Args:
        raw: see `generation.generate`.
    """

    def __init__(
        self, loaded: Loaded, options: GenerationOptions, console: Console | None = None, raw: bool | None = None
    ) -> None:
        if loaded.kind != "causal":
            raise UserError(
                "a masked language model cannot chat: use `finetune generate --prompt 'text with the mask token'`"
            )
        self.loaded = loaded
        self.options = options
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.history: Conversation = []
        self.raw = raw
        self.turns = has_template(loaded.tokenizer) and not (loaded.asks_plainly if raw is None else raw)

    def run(self) -> None:
        """Answer each line until the end of the input or `/exit`."""
        for line in self._lines():
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                self._say(line)

    def answer(self, text: str) -> str:
        """Print the answer while it is generated, and add both turns to the history. Ctrl-C ends the answer early.

        Raises:
            UserError: the conversation exceeds the context length of the model; the history is not changed.
        """
        turn = {"role": "user", "content": text}
        prompt = [*self.history, turn] if self.turns else text
        pieces = stream(self.loaded, prompt, self.options, raw=self.raw)
        answer = "".join(self._print(pieces))
        if self.turns:
            self.history += [turn, {"role": "assistant", "content": answer}]
        return answer

    def command(self, line: str) -> bool:
        """Run a `/command`. Return False for `/exit`."""
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
        import readline  # noqa: F401  # adds line editing to input()

        self._note("/help lists the commands, Ctrl-D exits")
        while True:
            try:
                yield self.console.input("[bold cyan]> [/]").strip()
            except KeyboardInterrupt:
                self._note("\n(/exit or Ctrl-D exits)")
            except EOFError:
                return

    def _say(self, text: str) -> None:
        try:
            self.answer(text)
        except UserError as error:
            self._note(f"{error}; /reset starts a new conversation")

    def _print(self, pieces: Iterator[str]) -> Iterator[str]:
        with closing(pieces):  # type: ignore[type-var]  # `stream` is a generator
            try:
                for piece in pieces:
                    yield piece
                    self.console.print(piece, end="", markup=False)
                    self.console.file.flush()
            except KeyboardInterrupt:
                self.console.print(" ...", end="", style="dim")
        self.console.print()

    def _reset(self, _: str = "") -> None:
        self.history = []
        self._note("new conversation")

    def _system(self, text: str) -> None:
        if not self.turns:
            self._note("this model continues plain text: it has no system message")
            return
        self.options = replace(self.options, system=text or None)
        self._reset()

    def _save(self, name: str) -> None:
        if not name or not self.history:
            self._note("/save needs a file name" if self.history else "the conversation is empty")
            return
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n")
        except OSError as error:
            self._note(f"cannot write {name}: {error.strerror}")
            return
        self._note(f"saved to {name}")

    def _messages(self) -> Conversation:
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        return system + self.history

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            self._note(f"{name:8} {meaning}")

    def _note(self, text: str) -> None:
        """Print a line that is not output of the model, to standard error if standard output is not a terminal."""
        if self.console.is_terminal:
            self.console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
