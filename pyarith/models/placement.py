"""Models that accelerate has spread over devices (``device_map``): where modules run, and weights that lie elsewhere.

accelerate wraps the forward of each module: inputs are moved to its device, and offloaded weights, which are on the
meta device in between, are brought there for the call. accelerate is never imported; its hooks are known by their
attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _alignment(module: nn.Module) -> Any:
    """accelerate's hook that says where a module runs; None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several hooks are one that holds them
    return next((one for one in hooks if hasattr(one, "execution_device")), None)


def is_spread(model: nn.Module) -> bool:
    """Whether modules of this model run on different devices, or have their weights elsewhere until they do."""
    held = [
        module
        for module in model.modules()
        if _alignment(module) is not None and next(module.parameters(False), None) is not None
    ]
    return any(map(is_offloaded, held)) or len({device_of(module) for module in held}) > 1


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module runs; None where neither accelerate nor parameters say it."""
    hook = _alignment(module)
    if hook is not None and hook.execution_device is not None:
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    first = next(module.parameters(), None)
    return None if first is None else first.device


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's weights are elsewhere until it runs."""
    hook = _alignment(module)
    return hook is not None and bool(hook.offload)


def own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's own, at most wrapped by accelerate."""
    if "forward" not in vars(module):
        return True
    wrapped = getattr(vars(module).get("_old_forward"), "__func__", None)
    return _alignment(module) is not None and wrapped is type(module).forward


def weight_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module, on the device where it runs; brought there where it is offloaded."""
    tensor: Tensor = getattr(module, name)
    if not (tensor.is_meta and is_offloaded(module)):
        return tensor
    hook = _alignment(module)
    found: Mapping[str, Tensor] = hook.weights_map
    return found[name].to(device_of(module))


def offloaded_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Names of all parameters and buffers that are offloaded, and where they are kept; disk files are mapped."""
    found = {}
    for path, module in model.named_modules():
        if is_offloaded(module):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_meta:
                    found[f"{path}.{name}" if path else name] = _alignment(module).weights_map[name]
    return found
