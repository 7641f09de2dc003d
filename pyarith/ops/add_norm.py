"""`add_norm`: update the residual rows of all variants and normalise them, in one pass over memory."""

from __future__ import annotations

import torch

from pyarith.errors import InputError
from pyarith.ops import _native
from pyarith.ops._contract import (
    FLOATS,
    KINDS,
    WIDE,
    expect_dims,
    expect_like,
    expect_no_grad,
    expect_one_of,
    expect_shape,
    expect_tensor,
)
from pyarith.ops._registry import Backend, define

Tensor = torch.Tensor


def check_norm(row: Tensor, write: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str) -> torch.dtype:
    """The part of the contract that `add_norm` and `answer_logits` share; returns the dtype of the rows."""
    expect_one_of("kind", kind, KINDS)
    expect_dims("row", row, 3, "[variant, batch, d_model]")
    device = row.device
    expect_like("row", row, device, WIDE)
    shape = row.shape
    expect_shape("weight", weight, shape[2:], "[d_model]")
    expect_like("weight", weight, device, FLOATS)
    if write is not None:
        expect_shape("write", write, shape[1:], "[batch, d_model]")
        expect_like("write", write, device, FLOATS)
    if bias is not None:
        if kind != "layer":
            raise InputError(f"bias: only kind 'layer' has one, got a bias with kind {kind!r}")
        expect_shape("bias", bias, shape[2:], "[d_model]")
        expect_like("bias", bias, device, FLOATS)
    return row.dtype


def _check(
    row: Tensor,
    delta: Tensor | None,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
) -> torch.dtype:
    dtype = check_norm(row, write, weight, bias, kind)
    if not row.is_contiguous():
        raise InputError(f"row: expected a contiguous tensor (it is updated in place), got strides {row.stride()}")
    if delta is not None:
        expect_shape("delta", delta, row.shape, "[variant, batch, d_model]")
        expect_like("delta", delta, row.device, FLOATS)
    expect_shape("out", out, row.shape, "[variant, batch, d_model]")
    expect_like("out", out, row.device, FLOATS)
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    return dtype if dtype is torch.float64 else out.dtype


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Plain norm over the last dimension in the dtype of ``x``, nothing rounded on the way."""
    weight = weight.to(x.dtype)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    elif kind == "rms1p":
        weight = 1 + weight
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return x if bias is None else x + bias.to(x.dtype)


def reference(
    row: Tensor,
    delta: Tensor | None,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
) -> None:
    """The meaning of the op in plain PyTorch."""
    if delta is not None:
        row += delta
    if write is not None:
        row += write
    out.copy_(normalise(row, weight, bias, eps, kind))


def _upcast(tensor: Tensor | None, kept: tuple[torch.dtype, ...]) -> Tensor | None:
    """``tensor`` contiguous in a dtype that the kernel reads, itself where it already is."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in kept else tensor.float()).contiguous()


_F32 = (torch.float32,)
_CPU_READS = (torch.float32, torch.bfloat16)
_CUDA_READS = (torch.float32, torch.bfloat16, torch.float16)


def _cpu(
    row: Tensor,
    delta: Tensor | None,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
) -> None:
    _native.C.add_norm_cpu(
        row,
        _upcast(delta, _CPU_READS),
        _upcast(write, _F32),
        _upcast(weight, _CPU_READS),
        _upcast(bias, _CPU_READS),
        out,
        eps=eps,
        kind=kind,
        threads=_native.threads(),
    )


def _cuda(
    row: Tensor,
    delta: Tensor | None,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
) -> None:
    _native.launch(
        "add_norm_cuda",
        row,
        _upcast(delta, _CUDA_READS),
        _upcast(write, _F32),
        _upcast(weight, _CUDA_READS),
        _upcast(bias, _CUDA_READS),
        out,
        eps=eps,
        kind=kind,
    )


_op = define(
    "add_norm",
    "(Tensor(a!) row, Tensor? delta, Tensor? write, Tensor weight, Tensor? bias, Tensor(b!) out, "
    'float eps, str kind, *, str backend="auto") -> ()',
    _check,
    {
        "cpu": Backend(_cpu, ("cpu",), _native.why_not_cpu),
        "cuda": Backend(_cuda, ("cuda",), _native.why_not_cuda),
        "reference": Backend(reference),
    },
)


def add_norm(
    row: Tensor,
    delta: Tensor | None,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add a block's output to the residual rows of all variants, in place, and return their norm.

    row[v, b] = row[v, b] + delta[v, b] + write[b];  out[v, b] = norm(row[v, b]) where norm is
    rms: x * rsqrt(mean(x^2) + eps) * weight;  rms1p: the same with 1 + weight;
    layer: (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias.

    Args:
        row: residual rows, [variant, batch, d_model], fp32 or fp64, contiguous. Mutated.
        delta: per-variant addend of the shape of row, any float dtype, or None.
        write: addend shared by the variants, [batch, d_model], any float dtype, or None.
        weight: norm weight, [d_model], any float dtype.
        bias: norm bias, [d_model], kind "layer" only, or None.
        eps: added to the mean square (or variance).
        kind: one of `KINDS`.
        out: where to write the result, contiguous, of the shape of row; must not overlap row.
        out_dtype: dtype of a fresh result; default weight's.
        backend: "auto", or a name of the registry.
    Returns:
        [variant, batch, d_model] in out_dtype.
    Raises:
        InputError: a shape, dtype, device or name differs from the above; the message names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        Everything is computed in the dtype of row (accumulated in fp32 for fp32 rows) and rounded to
        out_dtype once; Hugging Face's 16-bit RMSNorm rounds before the weight as well. The native
        kernels give each row to one thread or block: bitwise repeatable, whatever the number of threads.
    References: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
    """
    expect_tensor("row", row)
    expect_tensor("weight", weight)
    expect_no_grad("add_norm", row, delta, write, weight, bias, out)
    if out is None:
        out = torch.empty(row.shape, dtype=out_dtype or weight.dtype, device=row.device)
    elif out_dtype is not None and out.dtype is not out_dtype:
        raise InputError(f"out: expected dtype {out_dtype} (out_dtype), got {out.dtype}")
    _op(row, delta, write, weight, bias, out, eps, kind, backend=backend)
    return out
