"""Registration of the commands `chat` and `generate`."""

from __future__ import annotations

import typer

from finetune_cli.chat import chat_command, generate_command


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("chat")(chat_command)
    app.command("generate")(generate_command)
