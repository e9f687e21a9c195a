"""Weights that DeepSpeed's ZeRO-3 has divided among the workers: whole for a moment, or divided anew.

Everything here is a no-op for weights that are not divided, and a collective for those that are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


def is_divided(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 holds the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters are whole inside, to be read."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def partition(module: nn.Module) -> None:
    """Divide a module's own parameters that are not yet divided; each worker holds them whole before."""
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())


@contextmanager
def undivided_loading() -> Iterator[None]:
    """Inside, a model loads whole on the worker that asks for it, also while a ZeRO-3 stage is set up."""
    from transformers.integrations import deepspeed as integration

    divided = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = divided


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside, each module of a model gathers its own weights for its forward pass, without gradients.

    DeepSpeed's engine does that with hooks of its own, but only once it exists, which is after the optimizer does.
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
