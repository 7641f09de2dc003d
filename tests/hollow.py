"""Models of real size whose tensors have shapes but no data, and a record of what runs on them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = {
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


@dataclass
class Recorded(TorchDispatchMode):
    """Names of all ops, and the high-water mark of bytes that were allocated meanwhile and are still alive."""

    names: list[str] = field(default_factory=list)
    alive: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).split(".")[1])
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def hollow(name: str, **changes: int):
    """A random-weight model of that shape whose parameters have no data (inside a FakeTensorMode)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPES[name], **changes})).eval()
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=torch.bfloat16)
                module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
        for key, value in module._buffers.items():
            module._buffers[key] = torch.empty(value.shape, dtype=value.dtype)
    return model
