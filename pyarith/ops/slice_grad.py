"""`slice_grad`: the gradient of chosen rows and columns of a weight, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyarith.errors import InputError
from pyarith.ops._contract import (
    FLOATS,
    Pair,
    expect_dims,
    expect_like,
    expect_no_grad,
    expect_ranges,
    expect_shape,
    expect_tensor,
    flat_bounds,
)
from pyarith.ops._registry import Backend, define
from pyarith.ops._triton import why_not as why_not_triton

Tensor = torch.Tensor

_ELEMENTS = 2**24  # features of tokens that are copied, side by side or widened, at a time
_LEAST_TOKENS = 1024


def joined(bounds: Sequence[int]) -> list[Pair]:
    """(start, stop) pairs of a flat list of bounds; those that touch are made one."""
    pairs: list[Pair] = []
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        if pairs and pairs[-1][1] == start:
            pairs[-1] = (pairs[-1][0], stop)
        else:
            pairs.append((start, stop))
    return pairs


def _taken(name: str, bounds: Sequence[int] | None, features: int) -> int:
    return features if bounds is None else expect_ranges(name, bounds, features)


def _check(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    left_ranges: Sequence[int] | None,
    right_ranges: Sequence[int] | None,
    accumulate: bool,
) -> torch.dtype:
    device = left.device
    expect_dims("left", left, 2, "[token, m]")
    expect_like("left", left, device, FLOATS)
    expect_dims("right", right, 2, "[token, n]")
    expect_shape("right", right, (left.shape[0], right.shape[1]), "[token, n]")
    expect_like("right", right, device, frozenset((left.dtype,)))
    shape = (_taken("left_ranges", left_ranges, left.shape[1]), _taken("right_ranges", right_ranges, right.shape[1]))
    expect_shape("out", out, shape, "[rows taken, columns taken]")
    expect_like("out", out, device, frozenset((torch.float64 if left.dtype is torch.float64 else torch.float32,)))
    if (shape[1] > 1 and out.stride(1) != 1) or (shape[0] > 1 and out.stride(0) < shape[1]):
        raise InputError(
            f"out: expected rows of consecutive elements that do not overlap, got strides {out.stride()} "
            f"for shape {shape}"
        )
    return left.dtype


def _side_by_side(x: Tensor, bounds: Sequence[int] | None) -> Tensor:
    """The features of ``bounds``: a view of one block, else a copy, as one large product beats several."""
    if bounds is None:
        return x
    parts = [x.narrow(1, start, stop - start) for start, stop in joined(bounds)] or [x.narrow(1, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def reference(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    left_ranges: Sequence[int] | None,
    right_ranges: Sequence[int] | None,
    accumulate: bool,
) -> None:
    """The meaning of the op in plain PyTorch: one product of the vendor's library per chunk of tokens."""
    if not accumulate:
        out.zero_()
    chunk = max(_LEAST_TOKENS, _ELEMENTS // max(sum(out.shape), 1))
    for some_left, some_right in zip(left.split(chunk), right.split(chunk), strict=True):
        rows, columns = _side_by_side(some_left, left_ranges).T, _side_by_side(some_right, right_ranges)
        if left.is_cuda and left.dtype is not out.dtype:
            # 16-bit factors, fp32 accumulation and result; no such form of addmm adds in place
            out.add_(torch.mm(rows, columns, out_dtype=out.dtype))
        else:
            out.addmm_(rows.to(out.dtype), columns.to(out.dtype))


def _triton(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    left_ranges: Sequence[int] | None,
    right_ranges: Sequence[int] | None,
    accumulate: bool,
) -> None:
    from pyarith.ops._triton.slice_grad import launch

    launch(left, right, out, left_ranges, right_ranges, accumulate)


_op = define(
    "slice_grad",
    "(Tensor left, Tensor right, Tensor(a!) out, int[]? left_ranges, int[]? right_ranges, bool accumulate, *, "
    'str backend="auto") -> ()',
    _check,
    {
        "triton": Backend(_triton, ("cuda",), why_not_triton),
        "reference": Backend(reference),
    },
)


def _flat(name: str, ranges: Sequence[Pair] | None) -> list[int] | None:
    return None if ranges is None else flat_bounds(name, ranges)


def slice_grad(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    left_ranges: Sequence[Pair] | None = None,
    right_ranges: Sequence[Pair] | None = None,
    *,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The gradient of chosen rows and columns of the weight of a linear layer; the rest is never computed.

    out[i, j] (+)= sum_t left[t, l[i]] * right[t, r[j]], l and r the features that the ranges take, in their order.

    For an nn.Linear, whose weight is [out, in], left is the gradient of the layer's result and right its input, so that
    rows of the weight are ``left_ranges`` and columns ``right_ranges``; for a Conv1D ([in, out]) the two change places.

    Args:
        left: [token, m], any float dtype, any strides.
        right: [token, n], of the same dtype, any strides.
        out: where to write, [rows taken, columns taken], fp64 for fp64 inputs, else fp32; rows may lie apart, the
            elements of one follow each other; overlaps no input.
        left_ranges, right_ranges: sorted (start, stop) pairs that do not overlap (they may touch), or None for all.
        accumulate: add to ``out`` instead of overwriting it.
        backend: "auto", or a name of the registry.
    Returns:
        ``out``.
    Raises:
        InputError: a shape, dtype, device or range differs from the above; the message names the argument.
        InputTypeError: ranges that are not pairs of integers.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        16-bit inputs are exact factors, products are accumulated in fp32 (fp64 for fp64 inputs), also over several
        calls with ``accumulate``. Ranges that touch cost as much as one. On a CPU the reference runs: MKL's product,
        whose inputs are copied chunk by chunk where they are widened or several ranges are taken. On a GPU the Triton
        kernel runs where triton is installed, all ranges in one launch. Bitwise repeatable.
    """
    expect_tensor("left", left)
    expect_tensor("right", right)
    expect_tensor("out", out)
    expect_no_grad("slice_grad", left, right, out)
    bounds = _flat("left_ranges", left_ranges), _flat("right_ranges", right_ranges)
    _op(left, right, out, *bounds, accumulate, backend=backend)
    return out
