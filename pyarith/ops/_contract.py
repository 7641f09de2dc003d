"""Checks that every op shares: each names the argument, what was expected and what came.

They run in the fake function and in the real one, on every call, so messages are built only on failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pyarith.errors import InputError, InputTypeError

Pair = tuple[int, int]

KINDS = ("rms", "rms1p", "layer")
ACTS = ("silu", "gelu", "gelu_tanh", "relu")
FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
WIDE = frozenset((torch.float32, torch.float64))


def expect_shape(name: str, tensor: torch.Tensor, shape: Sequence[int], axes: str) -> None:
    """Raise unless ``tensor`` has exactly ``shape``; ``axes`` names the dimensions in the message."""
    if tensor.shape != shape:
        raise InputError(f"{name}: expected shape {axes} = {tuple(shape)}, got {tuple(tensor.shape)}")


def expect_dims(name: str, tensor: torch.Tensor, dims: int, axes: str) -> None:
    if tensor.dim() != dims:
        raise InputError(f"{name}: expected {axes}, got shape {tuple(tensor.shape)}")


def expect_like(name: str, tensor: torch.Tensor, device: torch.device, dtypes: frozenset[torch.dtype]) -> None:
    """Raise unless ``tensor`` is on ``device`` and of one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise InputError(f"{name}: expected dtype {known}; got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise InputError(f"{name}: expected device {device} (that of the first tensor), got {tensor.device}")


def expect_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name}: expected one of {', '.join(known)}; got {value!r}")


def expect_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise InputTypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def expect_no_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise if a gradient would be lost: these ops have none."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise InputError(f"{op} has no gradient, but an argument requires one: call it under torch.no_grad()")


def flat_bounds(name: str, ranges: Sequence[Pair]) -> list[int]:
    """Starts and stops of ``ranges`` in one list, as a schema takes them."""
    bounds: list[int] = []
    for pair in ranges:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputTypeError(f"{name}: expected (start, stop) pairs of integers, got {pair!r}")
        start, stop = pair
        if not isinstance(start, int) or not isinstance(stop, int):
            raise InputTypeError(f"{name}: expected (start, stop) pairs of integers, got {pair!r}")
        bounds += pair
    return bounds


def expect_ranges(name: str, bounds: Sequence[int], size: int) -> int:
    """Raise unless ``bounds`` are sorted ranges within ``size`` that do not overlap; returns how much they take."""
    if len(bounds) % 2:
        raise InputError(f"{name}: expected a start and a stop of each range, got {len(bounds)} numbers")
    taken = before = 0
    numbers = iter(bounds)
    for start, stop in zip(numbers, numbers, strict=True):
        if not before <= start < stop <= size:
            raise InputError(
                f"{name}: expected sorted (start, stop) pairs with start < stop that do not overlap and lie within "
                f"0 ... {size}; got ({start}, {stop})" + (f" after one that ends at {before}" if before else "")
            )
        taken, before = taken + stop - start, stop
    return taken


def split_bounds(bounds: Sequence[int], counts: Sequence[int]) -> Iterator[Sequence[int]]:
    """The bounds of each of several tensors, which have ``counts`` ranges, from one list of all."""
    at = 0
    for count in counts:
        yield bounds[at : at + 2 * count]
        at += 2 * count
