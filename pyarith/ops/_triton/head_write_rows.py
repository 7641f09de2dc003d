"""out[h, b] = base[b] + dz[b, h] @ w_o[h]

Ownership: one program = one head, BLOCK_ROWS prompts, BLOCK_COLS columns of the residual stream; it owns that tile of
`out` and writes it once, base rows added in registers. Programs of the same columns follow each other, so that their
tile of w_o comes from L2.
Traffic: out 4 bytes an element, w_o once per BLOCK_ROWS prompts, dz and base small. FLOP: 2 d_head an element of out,
three times that where bf16 weights are split (below), in tensor cores.
Accumulation: fp32. A bf16 weight times an fp32 dz: dz = high + mid + low, three bf16 numbers that hold all 24 bits, so
three bf16 products accumulated in fp32 are the fp32 product; other weights are multiplied in IEEE fp32.
Repeatable bitwise: no atomics, a fixed order of d_head.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the parameters of a kernel have no Python types)

import torch
import triton
import triton.language as tl

from pyarith.ops._triton._launch import IEEE_ROWS, INTERPRETED, Launch, blocks, power_of_2, strides, vectorised
from pyarith.ops._triton._math import dot


@triton.jit(do_not_specialize=["batch"])
def _head_write_rows(
    dz,
    w_o,
    base,
    out,
    batch,
    d_head,
    d_model,
    dz_batch,
    dz_head,
    dz_d,
    w_o_head,
    w_o_d,
    w_o_col,
    base_batch,
    base_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(batch, BLOCK_ROWS)
    col_blocks = tl.cdiv(d_model, BLOCK_COLS)
    head = (program // (row_blocks * col_blocks)).to(tl.int64)
    # 64-bit from the first product with a stride on: out alone may hold more than 2^31 elements
    rows = ((program % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    cols = ((program // row_blocks % col_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    row_here = rows[:, None] < batch
    col_here = cols[None, :] < d_model
    dz_rows = dz + head * dz_head + rows[:, None] * dz_batch
    w_cols = w_o + head * w_o_head + cols[None, :] * w_o_col
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, d_head, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        change = tl.load(dz_rows + d[None, :] * dz_d, mask=row_here & (d[None, :] < d_head), other=0.0).to(tl.float32)
        weight = tl.load(w_cols + d[:, None] * w_o_d, mask=col_here & (d[:, None] < d_head), other=0.0)
        if SPLIT:
            high = change.to(tl.bfloat16)
            rest = change - high.to(tl.float32)
            mid = rest.to(tl.bfloat16)
            low = (rest - mid.to(tl.float32)).to(tl.bfloat16)
            acc = dot(low, weight, acc, UPCAST)
            acc = dot(mid, weight, acc, UPCAST)
            acc = dot(high, weight, acc, UPCAST)
        else:
            acc = dot(change, weight.to(tl.float32), acc, False)
    here = row_here & col_here
    if base is not None:
        acc += tl.load(base + rows[:, None] * base_batch + cols[None, :] * base_col, mask=here, other=0.0).to(
            tl.float32
        )
    tl.store(out + (head * batch + rows[:, None]) * d_model + cols[None, :], acc, mask=here)


def plan(dz: torch.Tensor, w_o: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor) -> Launch:
    """The launch for these tensors; depends on shapes, strides and dtypes only."""
    batch, head, d_head = dz.shape
    d_model = w_o.shape[2]
    split = w_o.dtype is torch.bfloat16
    rows = power_of_2(batch, 16, 64 if split else IEEE_ROWS)
    # an address for every element instead of one for eight needs registers: narrower tiles
    cols = power_of_2(d_model, 16, 128 if split and vectorised(w_o) else 64)
    return Launch(
        _head_write_rows,
        programs=head * blocks(batch, rows) * blocks(d_model, cols),
        arguments=dict(
            dz=dz,
            w_o=w_o,
            base=base,
            out=out,
            batch=batch,
            d_head=d_head,
            d_model=d_model,
            **strides("dz", dz, "batch", "head", "d"),
            **strides("w_o", w_o, "head", "d", "col"),
            **strides("base", base, "batch", "col"),
            BLOCK_ROWS=rows,
            BLOCK_COLS=cols,
            BLOCK_D=power_of_2(d_head, 16, 32 if split else 16),
            SPLIT=split,
            UPCAST=INTERPRETED,
        ),
        num_warps=8 if rows == 64 else 4,
        num_stages=2,
    )


def launch(dz: torch.Tensor, w_o: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fill ``out``; arguments as in the op's schema."""
    plan(dz, w_o, base, out).start(out)
