"""What each Ray Train worker runs. Light, because the driver imports it too."""

from __future__ import annotations

from finetune_trainer.launch.fault_location import faults_with_node
from finetune_trainer.launch.work_order import WorkOrder


def train_loop(config: dict[str, WorkOrder]) -> None:
    """Ray Train's `train_loop_per_worker`: all remaining trained stages, one after the other.

    The same workers run them all, because starting a worker costs far more than a small stage: importing the
    libraries alone takes over ten seconds of CPU.

    Args:
        config: the work order under `order`.

    Raises:
        UserError: a stage can't work.
        Interrupted: training was asked to stop and saved a checkpoint.
    """
    from finetune_trainer.launch.stage_run import run_stages

    with faults_with_node():
        run_stages(config["order"])
