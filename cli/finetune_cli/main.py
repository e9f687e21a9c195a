"""The `finetune` command."""

from __future__ import annotations

import typer

from finetune_cli import chat_commands, cluster_commands, doctor_command, expert_commands, job_commands, node_commands

app = typer.Typer(
    name="finetune",
    help="Train language models from a job file, on this machine or on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
job_commands.register(app)
doctor_command.register(app)
cluster_commands.register(app)
chat_commands.register(app)
expert_commands.register(app)
node_commands.register(app)


def main() -> None:
    """Entry point of the console script."""
    app()
