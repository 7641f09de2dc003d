"""hidden = act(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up): a candidate, not part of the library.

It would save writing gate and up and reading them back in `gated_act` (8 bytes an element of d_mlp in 16 bits), at
the price of a product that has to keep up with cuBLAS. It enters the library only when a record on a GPU shows that it
beats two cuBLAS products followed by `gated_act`; until then it exists for that comparison.

Ownership: one program = BLOCK_ROWS rows and BLOCK_COLS columns of hidden, with both accumulators in registers; written
once. Programs run in groups of GROUP row blocks, so that both operands stay in L2.
Traffic: x and the weights by tiles out of L2, hidden once. FLOP: 4 d_model an element of hidden, in tensor cores.
Accumulation: fp32, rounded once at the end (the two calls round gate, up and hidden). Repeatable bitwise: no atomics.
"""

import torch
import triton
import triton.language as tl

from pyarith.ops._triton._launch import INTERPRETED, Launch, blocks, power_of_2, strides
from pyarith.ops._triton._math import dot, tanh

_GROUP = 8


@triton.jit
def _activated(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACT == "relu")
        return tl.maximum(x, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _gate_up(
    x,
    w_gate,
    w_up,
    b_gate,
    b_up,
    out,
    rows,
    d_model,
    d_mlp,
    x_row,
    x_d,
    w_gate_col,
    w_gate_d,
    w_up_col,
    w_up_d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks, col_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(d_mlp, BLOCK_COLS)
    first = program // (GROUP * col_blocks) * GROUP
    group = min(row_blocks - first, GROUP)
    inside = program % (GROUP * col_blocks)
    row = ((first + inside % group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    col = (inside // group * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    row_here, col_here = row[:, None] < rows, col[None, :] < d_mlp
    gate = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    up = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, d_model, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        right_here = col_here & (d[:, None] < d_model)
        left = tl.load(x + row[:, None] * x_row + d[None, :] * x_d, mask=row_here & (d[None, :] < d_model), other=0.0)
        right = tl.load(w_gate + col[None, :] * w_gate_col + d[:, None] * w_gate_d, mask=right_here, other=0.0)
        gate = dot(left, right, gate, UPCAST)
        right = tl.load(w_up + col[None, :] * w_up_col + d[:, None] * w_up_d, mask=right_here, other=0.0)
        up = dot(left, right, up, UPCAST)
    if b_gate is not None:
        gate += tl.load(b_gate + col, mask=col < d_mlp, other=0.0).to(tl.float32)[None, :]
        up += tl.load(b_up + col, mask=col < d_mlp, other=0.0).to(tl.float32)[None, :]
    hidden = (_activated(gate, ACT) * up).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * d_mlp + col[None, :], hidden, mask=row_here & col_here)


def plan(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    out: torch.Tensor,
    act: str,
) -> Launch:
    """The launch for x [rows, d_model], weights [d_mlp, d_model], biases [d_mlp] or both None, out [rows, d_mlp]."""
    rows, d_model = x.shape
    d_mlp = w_gate.shape[0]
    block_rows, block_cols = power_of_2(rows, 16, 128), power_of_2(d_mlp, 16, 64)
    return Launch(
        _gate_up,
        programs=blocks(rows, block_rows) * blocks(d_mlp, block_cols),
        arguments=dict(
            x=x,
            w_gate=w_gate,
            w_up=w_up,
            b_gate=b_gate,
            b_up=b_up,
            out=out,
            rows=rows,
            d_model=d_model,
            d_mlp=d_mlp,
            **strides("x", x, "row", "d"),
            **strides("w_gate", w_gate, "col", "d"),
            **strides("w_up", w_up, "col", "d"),
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            BLOCK_D=64,
            GROUP=_GROUP,
            ACT=act,
            UPCAST=INTERPRETED,
        ),
        num_warps=8 if block_rows == 128 else 4,
        num_stages=3,
    )


def launch(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    out: torch.Tensor,
    act: str,
) -> None:
    """Fill ``out``, contiguous; see `plan`."""
    plan(x, w_gate, w_up, b_gate, b_up, out, act).start(out)
