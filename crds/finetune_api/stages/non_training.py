"""Stages beside the chain: what they leave is no model."""

from __future__ import annotations

from finetune_api.base import ApiModel


class BesideSpec(ApiModel):
    """A stage that takes no optimizer steps, and after which the next one starts from the model before."""

    @property
    def trains(self) -> bool:
        """It takes no optimizer steps."""
        return False

    @property
    def hands_on(self) -> bool:
        """The next stage starts from the model before."""
        return False
