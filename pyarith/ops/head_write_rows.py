"""`head_write_rows`: what each head alone writes into the residual stream, for all heads of a layer."""

from __future__ import annotations

import torch

from pyarith.errors import InputError
from pyarith.ops import _native
from pyarith.ops._contract import FLOATS, WIDE, expect_dims, expect_like, expect_no_grad, expect_shape, expect_tensor
from pyarith.ops._registry import Backend, define
from pyarith.ops._triton import why_not as why_not_triton

Tensor = torch.Tensor


def _check(dz: Tensor, w_o: Tensor, base: Tensor | None, out: Tensor) -> torch.dtype:
    expect_dims("dz", dz, 3, "[batch, head, d_head]")
    expect_dims("w_o", w_o, 3, "[head, d_head, d_model]")
    device = dz.device
    expect_like("dz", dz, device, FLOATS)
    expect_like("w_o", w_o, device, FLOATS)
    batch, head, d_head = dz.shape
    d_model = w_o.shape[2]
    expect_shape("w_o", w_o, (head, d_head, d_model), "[head, d_head, d_model]")
    expect_shape("out", out, (head, batch, d_model), "[head, batch, d_model]")
    expect_like("out", out, device, WIDE)
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if base is not None:
        expect_shape("base", base, (batch, d_model), "[batch, d_model]")
        expect_like("base", base, device, FLOATS)
    return out.dtype


def reference(dz: Tensor, w_o: Tensor, base: Tensor | None, out: Tensor) -> None:
    """The meaning of the op in plain PyTorch."""
    rows = torch.einsum("bhd,hdm->hbm", dz.to(out.dtype), w_o.to(out.dtype))
    out.copy_(rows if base is None else rows + base.to(out.dtype))


def _bmm(dz: Tensor, w_o: Tensor, base: Tensor | None, out: Tensor) -> None:
    """One batched product of the vendor library, accumulating onto the base rows."""
    left, right = dz.to(out.dtype).transpose(0, 1), w_o.to(out.dtype)
    if base is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(base.to(out.dtype).expand(out.shape), left, right, out=out)


def _triton(dz: Tensor, w_o: Tensor, base: Tensor | None, out: Tensor) -> None:
    from pyarith.ops._triton.head_write_rows import launch

    launch(dz, w_o, base, out)


_op = define(
    "head_write_rows",
    '(Tensor dz, Tensor w_o, Tensor? base, Tensor(a!) out, *, str backend="auto") -> ()',
    _check,
    {
        "cpu": Backend(_bmm, ("cpu",)),
        "triton": Backend(_triton, ("cuda",), why_not_triton),
        "cuda": Backend(_bmm, ("cuda",), _native.why_not_cuda),
        "reference": Backend(reference),
    },
)


def head_write_rows(
    base: Tensor | None,
    dz: Tensor,
    w_o: Tensor,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rows of the residual stream in which one head's output changed, one variant per head.

    out[h, b] = base[b] + dz[b, h] @ w_o[h]

    Args:
        base: what every variant starts from, [batch, d_model], any float dtype, or None for zero.
        dz: change of the heads' outputs before the output projection, [batch, head, d_head], any float dtype.
        w_o: output projection split by head, [head, d_head, d_model], any float dtype and strides: a view of the
            weight of an nn.Linear or a Conv1D.
        out: where to write, [head, batch, d_model], contiguous, fp32 or fp64; overlaps no input.
        backend: "auto", or a name of the registry.
    Returns:
        [head, batch, d_model], fp64 where an input is fp64, else fp32.
    Raises:
        InputError: a shape, dtype or device differs from the above; the message names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        16-bit inputs are upcast, so that the product is exact to fp32 accumulation. On a GPU the Triton kernel runs
        where triton is installed (bf16 weights in tensor cores, by three exact bf16 terms of dz), else cuBLAS, which
        needs an fp32 copy of w_o; fp64 results come from cuBLAS or the reference. Bitwise repeatable.
    """
    expect_tensor("dz", dz)
    expect_tensor("w_o", w_o)
    expect_no_grad("head_write_rows", base, dz, w_o, out)
    if out is None:
        expect_dims("dz", dz, 3, "[batch, head, d_head]")
        expect_dims("w_o", w_o, 3, "[head, d_head, d_model]")
        known = (dz.dtype, w_o.dtype, torch.float32 if base is None else base.dtype)
        wide = torch.float64 if torch.float64 in known else torch.float32
        out = torch.empty((dz.shape[1], dz.shape[0], w_o.shape[2]), dtype=wide, device=dz.device)
    _op(dz, w_o, base, out, backend=backend)
    return out
