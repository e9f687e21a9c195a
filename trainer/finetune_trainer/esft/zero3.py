"""Gather weights that DeepSpeed's ZeRO-3 has divided among the workers, and divide them again.

Each function does nothing for weights that are not divided, and is a collective for those that are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


def is_divided(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether ZeRO-3 has divided any of the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather the parameters inside a `with` block, for reading."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def partition(module: nn.Module) -> None:
    """Divide a module's parameters that are not yet divided; each worker must hold them whole."""
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())  # type: ignore[no-untyped-call]


@contextmanager
def undivided_loading() -> Iterator[None]:
    """Load models whole inside a `with` block, even while a ZeRO-3 stage is set up."""
    from transformers.integrations import deepspeed as integration

    divided = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = divided


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Make each module gather its own weights for its forward pass inside a `with` block, without gradients.

    DeepSpeed's engine has hooks for this, but the engine is created only after the optimizer.
    """
    handles: list[RemovableHandle] = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if is_divided(own):
            handles += _gather_around(module, own)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather_around(module: nn.Module, own: list[nn.Parameter]) -> list[RemovableHandle]:
    stack = ExitStack()

    def before(*_: object) -> None:
        stack.enter_context(gathered(own))

    def after(*_: object) -> None:
        stack.close()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
