"""Base class of stages that produce no model."""

from __future__ import annotations

from finetune_api.base import ApiModel


class NonTrainingSpec(ApiModel):
    """A stage without optimizer steps. The next stage starts from the same model."""

    @property
    def trains(self) -> bool:
        """Return False: the stage runs no optimizer steps."""
        return False

    @property
    def produces_model(self) -> bool:
        """Return False: the next stage starts from the model of an earlier stage."""
        return False
