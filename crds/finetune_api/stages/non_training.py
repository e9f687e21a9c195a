"""Base class of stages that produce no model."""

from __future__ import annotations

from finetune_api.declaration import StageDeclaration


class NonTrainingSpec(StageDeclaration):
    """A stage without optimizer steps. The next stage starts from the same model."""

    @property
    def trains(self) -> bool:
        return False
