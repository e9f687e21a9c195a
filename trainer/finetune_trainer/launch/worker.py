"""The training function of each Ray Train worker. It imports little, because the driver imports it too."""

from __future__ import annotations

from finetune_trainer.launch.fault_location import faults_with_node
from finetune_trainer.launch.work_order import WorkOrder


def train_loop(config: dict[str, WorkOrder]) -> None:
    """Run all remaining stages, one after the other. This is Ray Train's `train_loop_per_worker`.

    The same workers run all stages, because starting a worker costs more than a small stage: importing the libraries
    alone takes over ten seconds of CPU time.

    Args:
        config: the work order, under the key `order`.

    Raises:
        UserError: the settings or data of a stage are unusable.
        Interrupted: the driver has asked to stop, and a checkpoint was saved.
    """
    from finetune_trainer.launch.stage_run import run_stages

    with faults_with_node():
        run_stages(config["order"])
