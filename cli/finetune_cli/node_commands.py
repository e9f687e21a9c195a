"""The hidden commands that the operator's pods run: `node`, `await-driver`, `preflight` and `cleanup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunConfigFile = Annotated[Path, typer.Option("--run-config", help="RunConfig of the attempt, written by the operator.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("node", hidden=True)(node_command)
    app.command("await-driver", hidden=True)(await_driver_command)
    app.command("preflight", hidden=True)(preflight_command)
    app.command("cleanup", hidden=True)(cleanup_command)


def node_command(run_config: RunConfigFile) -> None:
    """Run a node of an attempt: node 0 starts the Ray head and the driver, the others join it."""
    from finetune_trainer.launch.node import run_node

    raise typer.Exit(run_node(run_config))


def await_driver_command() -> None:
    """Wait for the driver of this pod and exit with its code: what an engine submits to Ray."""
    from finetune_trainer.launch.driver_exit import wait_for_exit_code

    raise typer.Exit(wait_for_exit_code())


def preflight_command(run_config: RunConfigFile) -> None:
    """Check the model, data, storage and memory of a job before GPUs are requested."""
    from finetune_trainer.launch.cluster_preflight import run_preflight

    raise typer.Exit(int(run_preflight(run_config)))


def cleanup_command(run_config: RunConfigFile) -> None:
    """Delete the checkpoints and results of a job."""
    from finetune_trainer.launch.cleanup import run_cleanup

    raise typer.Exit(int(run_cleanup(run_config)))
