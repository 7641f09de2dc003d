"""Hugging Face models in true fp64.

RMSNorm, eager softmax and RoPE of transformers cast to fp32 even in a ``.double()`` model. Inside
``true_fp64()`` those casts, and only those that code in transformers asks for, become fp64: a cast in
pyarith stays what it is, so that the engine cannot hide one behind this helper.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _asked_by_transformers() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != "torch" and not name.startswith("torch.") and name != __name__:
            return name.startswith("transformers.")
        frame = frame.f_back
    return False


class true_fp64(TorchFunctionMode):
    """Context manager: fp32 casts made by transformers give fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # on the way of every op of every literal run: nothing is copied or compared where nothing is asked
        if func is torch.Tensor.float:
            if _asked_by_transformers():
                return args[0].double()
        elif kwargs and kwargs.get("dtype") is torch.float32:
            if _asked_by_transformers():
                kwargs = {**kwargs, "dtype": torch.float64}
        elif len(args) > 1:
            for argument in args:
                if argument is torch.float32:
                    if _asked_by_transformers():
                        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                    break
        return func(*args, **kwargs) if kwargs else func(*args)
