"""Calls of emulated kernels on guarded copies of their tensors, once for each order of threads and blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from cuda_on_cpu.build import ORDERS, Emulator

CANARY = 64  # bytes of NaN on both sides of each buffer; keeps its alignment


class Buffer:
    """A copy of a tensor between canaries, ``shift`` elements off its alignment, its rows ``gap`` elements apart."""

    def __init__(self, tensor: torch.Tensor, shift: int = 0, gap: int = 0):
        length, size = tensor.shape[-1], tensor.itemsize
        rows, width = tensor.numel() // length, length + gap
        begin = CANARY + shift * size
        self.bytes = torch.full((begin + rows * width * size + CANARY,), 0xFF, dtype=torch.uint8)
        inner = self.bytes[begin:-CANARY].view(tensor.dtype)
        self.tensor = inner.view(*tensor.shape[:-1], width)[..., :length]
        self.tensor.copy_(tensor)
        self._outside = torch.ones_like(self.bytes, dtype=torch.bool)
        self._outside[begin:-CANARY].view(rows, width * size)[:, : length * size] = False

    def assert_surroundings(self, name: str) -> None:
        assert (self.bytes[self._outside] == 0xFF).all(), f"{name}: written outside of the tensor"


def tensors_of(arguments: Mapping[str, object]) -> dict[str, tuple[str, torch.Tensor]]:
    """Every tensor by a name of its own, ``name[i]`` for one in a list, with the name of its argument."""
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for name, value in arguments.items():
        listed = {f"{name}[{i}]": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {own: (name, one) for own, one in listed.items() if isinstance(one, torch.Tensor)}
    return found


def run(
    built: tuple[ModuleType, Emulator],
    kernel: str,
    arguments: Mapping[str, object],
    written: Mapping[str, str],
    *,
    shift: int | Mapping[str, int] = 0,
    gaps: Mapping[str, int] | None = None,
    views: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    **scalars: object,
) -> dict[str, torch.Tensor]:
    """What ``kernel`` writes, shown to be the same for every order of threads and blocks.

    Args:
        arguments: tensors, lists of tensors or of numbers, and None by name, in the kernel's order; the name of another
            argument stands for the same memory.
        written: name -> "w" (starts as NaN) or "rw"; all others may only be read.
        shift: elements by which every buffer, or each named one, is off its alignment.
        gaps: name -> distance between rows beyond their length.
        views: name -> how the kernel sees the tensor.
    Returns:
        The tensors of the arguments that are written, by their names in `tensors_of`.
    """
    module, emulator = built
    results = []
    for order in ORDERS:
        buffers: dict[str, Buffer] = {}
        for own, (name, tensor) in tensors_of(arguments).items():
            start = torch.full_like(tensor, torch.nan) if written.get(name) == "w" else tensor
            off = shift if isinstance(shift, int) else shift.get(name, 0)
            buffers[own] = Buffer(start, off, (gaps or {}).get(name, 0))
        tensors = {own: buffer.tensor for own, buffer in buffers.items()}
        modes = {own: written.get(name, "r") for own, (name, _) in tensors_of(arguments).items()}
        seen = tensors | {name: view(tensors[name]) for name, view in (views or {}).items()}
        passed = []
        for name, value in arguments.items():
            if isinstance(value, list):
                passed.append([seen.get(f"{name}[{i}]", one) for i, one in enumerate(value)])
            else:
                passed.append(seen.get(value if isinstance(value, str) else name))
        with emulator.order(*order), emulator.only(*((tensors[own], modes[own]) for own in tensors)):
            getattr(module, kernel)(*passed, **scalars, stream=0)
        for own, buffer in buffers.items():
            buffer.assert_surroundings(own)
        results.append({own: tensor for own, tensor in tensors.items() if modes[own] != "r"})
    for result in results[1:]:
        for own, first in results[0].items():
            same = torch.equal(result[own].contiguous().view(torch.uint8), first.contiguous().view(torch.uint8))
            assert same, f"{own} depends on the order of threads or blocks"
    return results[0]
