"""out[i, j] (+)= sum_t left[t, l[i]] * right[t, r[j]], l and r the features that the ranges take

Ownership: one program = BLOCK_ROWS x BLOCK_COLS of `out` and one split of the tokens; it writes its tile once, into
`out` where there is one split, else into the partial sums of that split, which a second kernel adds up. All ranges are
in one launch: a tile takes its columns from the tables l and r, so that it may span several ranges (several heads
share a tile). Programs run in groups of GROUP row blocks, so that what is read at one time stays in L2.
Traffic: left once per block of columns, right once per block of rows, mostly out of L2; out once, and 8 bytes more an
element and split where there are several. FLOP: 2 a token and element of out: bound by the tensor cores.
Accumulation: fp32; 16-bit factors go through tensor cores, fp32 ones are multiplied in IEEE fp32.
Repeatable bitwise: no atomics; the number of splits depends on the shapes only, and they are added in their order.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the parameters of a kernel have no Python types)

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl

from pyarith.ops._triton._launch import (
    IEEE_ROWS,
    INTERPRETED,
    MATRIX_DTYPES,
    Launch,
    blocks,
    power_of_2,
    strides,
    vectorised,
)
from pyarith.ops._triton._math import dot
from pyarith.ops.slice_grad import joined

_PROGRAMS = 256  # about one wave on any device, whose own number of processors must not change the result
_SPLIT_TOKENS = 512  # fewer, and writing and adding partial sums would take longer than the products
_GROUP = 8
_GRANULE = 16  # elements of 16 bits in two of the widest loads


@triton.jit
def _columns(table, place, here, GRANULE: tl.constexpr):
    """Columns of the input for these places of the result; GRANULE of them at a time follow each other, aligned."""
    if table is not None:
        found = tl.load(table + place, mask=here, other=0)
        place = tl.max_contiguous(tl.multiple_of(found, GRANULE), GRANULE)
    return place


@triton.jit(do_not_specialize=["tokens", "split_steps"])
def _slice_grad(
    left,
    right,
    row_table,
    col_table,
    out,
    tokens,
    rows,
    cols,
    split_steps,
    left_token,
    left_feature,
    right_token,
    right_feature,
    out_split,
    out_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_GRANULE: tl.constexpr,
    COL_GRANULE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = row_blocks * tl.cdiv(cols, BLOCK_COLS)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first = tile // (GROUP * tl.cdiv(cols, BLOCK_COLS)) * GROUP
    group = min(row_blocks - first, GROUP)
    inside = tile - first * tl.cdiv(cols, BLOCK_COLS)
    row = ((first + inside % group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    col = ((inside // group) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    row_here = row < rows
    col_here = col < cols
    left_start = left + _columns(row_table, row, row_here, ROW_GRANULE)[:, None] * left_feature
    right_start = right + _columns(col_table, col, col_here, COL_GRANULE)[None, :] * right_feature
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    last = min((split + 1) * split_steps, tl.cdiv(tokens, BLOCK_TOKENS))
    for step in range(split * split_steps, last):
        token = (step * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        here = token < tokens
        a = tl.load(left_start + token[None, :] * left_token, mask=row_here[:, None] & here[None, :], other=0.0)
        b = tl.load(right_start + token[:, None] * right_token, mask=col_here[None, :] & here[:, None], other=0.0)
        acc = dot(a, b, acc, UPCAST)
    place = out + split.to(tl.int64) * out_split + row[:, None] * out_row + col[None, :]
    here = row_here[:, None] & col_here[None, :]
    if ACCUMULATE:
        acc += tl.load(place, mask=here, other=0.0)
    tl.store(place, acc, mask=here)


@triton.jit(do_not_specialize=["splits"])
def _slice_grad_combine(
    partials,
    out,
    cols,
    splits,
    partials_split,
    partials_row,
    out_row,
    BLOCK_COLS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    col = (tl.program_id(0) % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    here = col < cols
    total = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    place = row * partials_row + col
    for _ in range(splits):
        total += tl.load(partials + place, mask=here, other=0.0)
        place += partials_split
    if ACCUMULATE:
        total += tl.load(out + row * out_row + col, mask=here, other=0.0)
    tl.store(out + row * out_row + col, total, mask=here)


def _side(x: torch.Tensor, bounds: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """(input, table of its columns or None for all, how many columns at a time follow each other, aligned)."""
    pairs = [(0, x.shape[1])] if bounds is None else joined(bounds) or [(0, 0)]
    granule = gcd(_GRANULE, *(bound for pair in pairs for bound in pair))
    if len(pairs) == 1:
        start, stop = pairs[0]
        return x[:, start:stop], None, granule
    # made on the device out of numbers that travel with the launch: no transfer, so a graph can capture it
    return x, torch.cat([torch.arange(start, stop, device=x.device) for start, stop in pairs]), granule


def plan(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    left_ranges: Sequence[int] | None,
    right_ranges: Sequence[int] | None,
    accumulate: bool,
) -> tuple[Launch, ...]:
    """The one or two launches for these tensors, in their order; depend on shapes, strides, ranges and dtypes only."""
    tokens = left.shape[0]
    rows, cols = out.shape
    left, row_table, row_granule = _side(left, left_ranges)
    right, col_table, col_granule = _side(right, right_ranges)
    matrix = left.dtype in MATRIX_DTYPES
    # an address for every element instead of one for eight needs registers: smaller tiles
    large = matrix and vectorised(left) and vectorised(right) and min(row_granule, col_granule) >= 8
    block_rows = power_of_2(rows, 16, 128 if large else 64 if matrix else IEEE_ROWS)
    block_cols = power_of_2(cols, 16, 128 if large else 64)
    block_tokens = 64 if large else 32 if matrix else 16
    tiles = blocks(rows, block_rows) * blocks(cols, block_cols)
    steps = blocks(tokens, block_tokens)
    splits = max(1, min(_PROGRAMS // max(tiles, 1), tokens // _SPLIT_TOKENS))
    split_steps = blocks(steps, splits)
    splits = max(1, blocks(steps, max(split_steps, 1)))
    partials = out[None] if splits == 1 else out.new_empty((splits, rows, cols))
    products = Launch(
        _slice_grad,
        programs=tiles * splits,
        arguments=dict(
            left=left,
            right=right,
            row_table=row_table,
            col_table=col_table,
            out=partials,
            tokens=tokens,
            rows=rows,
            cols=cols,
            split_steps=split_steps,
            **strides("left", left, "token", "feature"),
            **strides("right", right, "token", "feature"),
            out_split=partials.stride(0),
            out_row=partials.stride(1),
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            BLOCK_TOKENS=block_tokens,
            GROUP=_GROUP,
            ROW_GRANULE=row_granule,
            COL_GRANULE=col_granule,
            ACCUMULATE=accumulate and splits == 1,
            UPCAST=INTERPRETED or not matrix,
        ),
        num_warps=8 if block_rows * block_cols > 64 * 64 or (matrix and not large) else 4,
        num_stages=3 if large else 2,
    )
    if splits == 1:
        return (products,)
    block_cols = power_of_2(cols, 16, 1024)
    combine = Launch(
        _slice_grad_combine,
        programs=rows * blocks(cols, block_cols),
        arguments=dict(
            partials=partials,
            out=out,
            cols=cols,
            splits=splits,
            partials_split=partials.stride(0),
            partials_row=partials.stride(1),
            out_row=out.stride(0),
            BLOCK_COLS=block_cols,
            ACCUMULATE=accumulate,
        ),
        num_warps=4,
        num_stages=1,
    )
    return products, combine


def launch(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    left_ranges: Sequence[int] | None,
    right_ranges: Sequence[int] | None,
    accumulate: bool,
) -> None:
    """Fill ``out``, or add to it; arguments as in the op's schema."""
    for step in plan(left, right, out, left_ranges, right_ranges, accumulate):
        step.start(out)
