"""out[r] = log sum_t exp(cap(scale * (normed[r] . unembed[t]) + bias[t])), online over tiles of the vocabulary

Ownership: one program = BLOCK_ROWS rows and one split of the vocabulary; it walks its tiles of BLOCK_TOKENS tokens,
keeps a running maximum and sum per row in registers and writes that pair once. A second kernel, one program for a block
of rows, combines the pairs in the order of the splits. Programs run in groups of GROUP row blocks, so that what is read
at one time (GROUP tiles of normed, a few of unembed) stays in L2.
Traffic: unembed once per GROUP row blocks, normed once per tile of tokens out of L2, 8 bytes per row and split of
partial results. FLOP: 2 d_model per row and token: bound by the tensor cores. No [rows, d_vocab] exists.
Accumulation: fp32; two factors of the same 16-bit type go through tensor cores, anything else is widened to fp32.
Repeatable bitwise: no atomics; the number of splits depends on the shapes only.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the parameters of a kernel have no Python types)

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
from pyarith.ops._triton._math import dot, softcapped

_PROGRAMS = 1024  # several waves on any device, whose own number of processors must not change the result
_GROUP = 8


@triton.jit
def _finite_or_zero(x):
    # what is subtracted inside exp: a maximum of infinity would give infinity - infinity
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit(do_not_specialize=["rows", "d_vocab", "splits", "split_tiles"])
def _vocab_partial(
    normed,
    unembed,
    bias,
    maxima,
    sums,
    rows,
    d_vocab,
    d_model,
    splits,
    split_tiles,
    scale,
    softcap,
    normed_row,
    normed_d,
    unembed_token,
    unembed_d,
    bias_token,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    first = program // (GROUP * splits) * GROUP
    group = min(row_blocks - first, GROUP)
    inside = program % (GROUP * splits)
    split = inside // group
    row = ((first + inside % group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    row_here = row < rows
    step = tl.arange(0, BLOCK_D).to(tl.int64)
    row_start = normed + row[:, None] * normed_row
    top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    last = min((split + 1) * split_tiles, tl.cdiv(d_vocab, BLOCK_TOKENS))
    for tile in range(split * split_tiles, last):
        token = (tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        token_here = token < d_vocab
        token_start = unembed + token[None, :] * unembed_token
        acc = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), dtype=tl.float32)
        for start in range(0, d_model, BLOCK_D):
            d = start + step
            left = tl.load(
                row_start + d[None, :] * normed_d, mask=row_here[:, None] & (d[None, :] < d_model), other=0.0
            )
            right = tl.load(
                token_start + d[:, None] * unembed_d, mask=token_here[None, :] & (d[:, None] < d_model), other=0.0
            )
            acc = dot(left, right, acc, WIDEN)
        logits = scale * acc
        if bias is not None:
            logits += tl.load(bias + token * bias_token, mask=token_here, other=0.0).to(tl.float32)[None, :]
        logits = softcapped(logits, softcap, CAPPED)
        logits = tl.where(token_here[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = _finite_or_zero(new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = new_top
    place = split.to(tl.int64) * rows + row
    tl.store(maxima + place, top, mask=row_here)
    tl.store(sums + place, total, mask=row_here)


@triton.jit(do_not_specialize=["rows", "splits"])
def _vocab_combine(maxima, sums, out, rows, splits, BLOCK_ROWS: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    here = row < rows
    top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    place = row
    for _ in range(splits):
        part = tl.load(maxima + place, mask=here, other=float("-inf"))
        new_top = tl.maximum(top, part)
        shift = _finite_or_zero(new_top)
        total = total * tl.exp(top - shift) + tl.load(sums + place, mask=here, other=0.0) * tl.exp(part - shift)
        top = new_top
        place += rows
    tl.store(out + row, _finite_or_zero(top) + tl.log(total), mask=here)


def plan(
    normed: torch.Tensor,
    unembed: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[Launch, Launch]:
    """The two launches for these tensors, in their order; depend on shapes, strides and dtypes only."""
    rows, d_model = normed.shape
    d_vocab = unembed.shape[0]
    matrix = normed.dtype is unembed.dtype and normed.dtype in MATRIX_DTYPES
    # an address for every element instead of one for eight needs registers: smaller tiles
    large = matrix and vectorised(normed) and vectorised(unembed)
    block_rows = power_of_2(rows, 16, 128 if large else 64 if matrix else IEEE_ROWS)
    block_tokens = 64 if matrix and not large else 128
    tiles = blocks(d_vocab, block_tokens)
    row_blocks = blocks(rows, block_rows)
    split_tiles = max(1, blocks(tiles * row_blocks, _PROGRAMS))
    splits = max(1, blocks(tiles, split_tiles))
    maxima, sums = torch.empty((2, splits, rows), dtype=torch.float32, device=out.device)
    partial = Launch(
        _vocab_partial,
        programs=row_blocks * splits,
        arguments=dict(
            normed=normed,
            unembed=unembed,
            bias=bias,
            maxima=maxima,
            sums=sums,
            rows=rows,
            d_vocab=d_vocab,
            d_model=d_model,
            splits=splits,
            split_tiles=split_tiles,
            scale=scale,
            softcap=softcap,
            **strides("normed", normed, "row", "d"),
            **strides("unembed", unembed, "token", "d"),
            **strides("bias", bias, "token"),
            BLOCK_ROWS=block_rows,
            BLOCK_TOKENS=block_tokens,
            BLOCK_D=power_of_2(d_model, 16, 64 if large else 32 if matrix else 16),
            GROUP=_GROUP,
            CAPPED=softcap > 0,
            WIDEN=INTERPRETED or not matrix,
        ),
        num_warps=4 if matrix and block_rows <= 32 else 8,
        num_stages=3 if large else 2,
    )
    combine = Launch(
        _vocab_combine,
        programs=blocks(rows, 128),
        arguments=dict(maxima=maxima, sums=sums, out=out, rows=rows, splits=splits, BLOCK_ROWS=128),
        num_warps=4,
        num_stages=1,
    )
    return partial, combine


def launch(
    normed: torch.Tensor,
    unembed: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    """Fill ``out``; arguments as in the op's schema."""
    for step in plan(normed, unembed, bias, out, scale, softcap):
        step.start(out)
