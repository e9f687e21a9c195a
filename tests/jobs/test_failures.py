"""What a worker group's end means."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError

from finetune_trainer.launch.failures import Kind, classify


def test_a_helper_that_ray_kills_for_memory_is_out_of_memory() -> None:
    found = classify(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert found.kind is Kind.OUT_OF_MEMORY and not found.retryable and "low on memory" in found.text
