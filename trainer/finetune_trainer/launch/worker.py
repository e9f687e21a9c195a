"""What each Ray Train worker runs. Light, because the driver imports it too."""

from __future__ import annotations

from typing import Any


def train_loop(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`: one trained stage.

    Args:
        config: `run` (a RunConfig as JSON), `stage` (its index), `zero`, `threads`, `accelerator` and `channel`.

    Raises:
        UserError: the stage can't work.
        Interrupted: it was asked to stop and saved a checkpoint.
    """
    from finetune_trainer.launch.stage_run import run_stage

    run_stage(config)
