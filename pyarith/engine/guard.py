"""Running a model without leaving a trace: eval mode, no gradients, no autocast, hooks removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyarith.models.quantised import held


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in eval mode without gradients or autocast; every training flag is put back at the end.

    The previous flags are kept per module, since a model may be partly in training mode on purpose.
    """
    training = [module for module in model.modules() if module.training]
    ropes = [_Rope(module) for module in model.modules() if hasattr(module, "rope_type")]
    device = next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")  # offloaded ones are on meta
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(device, enabled=False), held(model):
            yield
    finally:
        for module in training:
            module.training = True
        for rope in ropes:
            rope.restore()


class _Rope:
    """Rotary embeddings of some kinds rewrite their own buffers and attributes in every forward pass.

    They do so on copies while this lives; ``restore`` puts the module's own back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        self.buffers = dict(module._buffers)
        for name, buffer in self.buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()

    def restore(self) -> None:
        attributes = vars(self.module)
        for name in [name for name in attributes if not name.startswith("_") and name not in self.attributes]:
            del attributes[name]
        attributes.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)


def output_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What ``module`` gives for ``x``: the first item where it gives a tuple, as hooks hand it over."""
    output = module(x)
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


class Hooks:
    """Forward hooks that live inside a ``with`` block.

    ``before(module, f)`` calls ``f(input)`` and, if it returns a tensor, uses that as the input;
    ``after(module, f)`` does the same with the output. Modules whose first result is a tuple hand over its first item.
    ``watch(module, f)`` calls ``f(args, kwargs)`` before every call of the module and changes nothing;
    ``see(module, f)`` calls ``f(output)`` after it, with tuples as they are.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def before(self, module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # blocks may get their hidden states by name
            if args:
                value = call(args[0])
                return None if value is None else ((value, *args[1:]), kwargs)
            value = call(kwargs["hidden_states"])
            return None if value is None else (args, {**kwargs, "hidden_states": value})

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, tuple):
                return call(output)
            value = call(output[0])
            return None if value is None else (value, *output[1:])

        self._handles.append(module.register_forward_hook(hook))

    def watch(self, module: nn.Module, call: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call(args, kwargs)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def see(self, module: nn.Module, call: Callable[[Any], None]) -> None:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            call(output)

        self._handles.append(module.register_forward_hook(hook))
