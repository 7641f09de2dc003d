"""A model of a config's shape with random weights, made as fast as memory can be written: to size a job before a model
is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyarith.errors import UnsupportedModelError
from pyarith.models.families import FAMILIES
from pyarith.models.sites import supported_families

_BLOCK = 2**20 - 3  # numbers drawn once and repeated; odd, so that rows of a matrix do not repeat
_DRAWS = ("normal_", "uniform_", "trunc_normal_", "erfinv_")


class NoDraws(TorchFunctionMode):
    """Inside, initialisation leaves memory as it comes: for weights that are overwritten, or have no data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def random_model(config: Any, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
    """A causal language model of ``config`` in eval mode whose weights mean nothing.

    Matrices hold N(0, 0.6^2 / n_in) from one block of numbers, repeated; weights of norms are 1 (0 where the norm
    multiplies by 1 + weight), biases 0. Times, memory and blocks are those of real weights; effects are not.

    Args:
        config: of transformers.
        dtype: of all weights.
        device: where they are made.
        seed: of the block.
    Raises:
        UnsupportedModelError: the family is not described.
    """
    from transformers import AutoModelForCausalLM

    spec = FAMILIES.get(config.model_type)
    if spec is None:
        raise UnsupportedModelError(
            f"config: expected one of the families {supported_families()}, got {config.model_type!r}"
        )
    generator = torch.Generator(device).manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator, device=device).to(dtype)
    with NoDraws(), torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    one = 0.0 if spec.norm == "rms1p" else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                _fill(weight.data.view(-1), block * (0.6 / weight.shape[-1] ** 0.5))
            else:
                weight.fill_(0.0 if name.endswith("bias") else one)
    return model


def _fill(flat: Tensor, block: Tensor) -> None:
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])
