"""Stages that train no model."""

from __future__ import annotations

from finetune_api.declaration import StageDeclaration


class BesideSpec(StageDeclaration):
    """A stage that takes no optimizer steps, and after which the next one starts from the model before."""

    @property
    def trains(self) -> bool:
        return False
