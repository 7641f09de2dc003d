"""Everything about a model and about torch that a call must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
)  # fmt: skip


def of_model(model: torch.nn.Module) -> dict[str, Any]:
    """Flags, hooks, attributes, weights (value, version, gradient) and config of a model, by name."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: class"] = type(module)
        state[f"{name}: training"] = module.training
        state[f"{name}: attributes"] = sorted(vars(module))
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | None)}
        state[f"{name}: values"] = plain
        for kind in _HOOKS:
            state[f"{name}: {kind}"] = dict(getattr(module, kind, {}))
        config = getattr(module, "config", None)
        if config is not None:
            # ``to_dict`` leaves the attention implementation out
            state[f"{name}: config"] = (id(config), config.to_dict(), config._attn_implementation, dict(vars(config)))
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            version = None if tensor.is_inference() else tensor._version
            facts = (id(tensor), tensor.data_ptr(), version, tensor.requires_grad, tensor.dtype, tensor.device)
            state[f"{name}: {kind}"] = facts
            if tensor.device.type != "meta":
                state[f"{name}: value"] = tensor.detach().clone()
            state[f"{name}: grad"] = None if tensor.grad is None else tensor.grad.clone()
    return state


def of_torch() -> dict[str, Any]:
    """Generators and global switches."""
    return {
        "torch rng": torch.get_rng_state(),
        "numpy rng": str(np.random.get_state()),
        "python rng": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "flush denormal": (torch.tensor([1e-310], dtype=torch.float64) / 2).item(),
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        # bit by bit, NaN included
        bits_a, bits_b = (t.reshape(-1).view(torch.uint8).numpy(force=True) for t in (a, b))
        return bits_a.tobytes() == bits_b.tobytes()
    return bool(a == b)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what changed."""
    return [key for key in sorted(before.keys() | after.keys()) if not _equal(before.get(key), after.get(key))]


@contextmanager
def unchanged(*models: Any) -> Iterator[None]:
    """Fail if the block changes a model or torch; an exception out of the block is checked and passed on."""
    real = [model for model in models if isinstance(model, torch.nn.Module)]
    before = [of_torch(), *map(of_model, real)]
    try:
        yield
    finally:
        after = [of_torch(), *map(of_model, real)]
        changed = [name for old, new in zip(before, after, strict=True) for name in differences(old, new)]
        assert not changed, f"changed: {changed}"
