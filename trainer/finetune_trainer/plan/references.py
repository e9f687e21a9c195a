"""Which stages compute with a reference model."""

from __future__ import annotations

from finetune_api.stages import DpoSpec, OnlineSpec, RlhfSpec, TrainedSpec


def has_reference(spec: TrainedSpec) -> bool:
    """Return whether each token costs a forward pass of a reference too."""
    if isinstance(spec, RlhfSpec):
        return spec.beta > 0
    return isinstance(spec, DpoSpec) and spec.reference != "precomputed"


def second_model(spec: TrainedSpec) -> bool:
    """Return whether a worker holds a second model as the reference."""
    if isinstance(spec, RlhfSpec):
        return spec.beta > 0 and spec.lora is None
    if isinstance(spec, OnlineSpec):
        return spec.reference == "start" and spec.lora is None
    if not isinstance(spec, DpoSpec):
        return False
    return spec.reference == "model" or (spec.reference == "auto" and spec.lora is None)
