"""`gated_act`: the elementwise middle of an MLP, gated or plain."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyarith.errors import InputError
from pyarith.ops import _native
from pyarith.ops._contract import ACTS, FLOATS, expect_like, expect_no_grad, expect_one_of, expect_shape, expect_tensor
from pyarith.ops._registry import Backend, define

Tensor = torch.Tensor


def _rows(tensor: Tensor) -> Tensor | None:
    """``tensor`` as [rows, d_mlp] sharing its memory with unit last stride, or None where strides forbid it."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return None
    if tensor.dim() == 2:
        return tensor
    try:
        return tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(0, tensor.shape[-1])
    except RuntimeError:
        return None


def _check(gate: Tensor, up: Tensor | None, out: Tensor, act: str) -> torch.dtype:
    expect_one_of("act", act, ACTS)
    if gate.dim() < 2:
        raise InputError(f"gate: expected at least two dimensions [..., d_mlp], got shape {tuple(gate.shape)}")
    device, dtype = gate.device, gate.dtype
    expect_like("gate", gate, device, FLOATS)
    same = frozenset((dtype,))
    if up is not None:
        expect_shape("up", up, gate.shape, "that of gate")
        expect_like("up", up, device, same)
    expect_shape("out", out, gate.shape, "that of gate")
    expect_like("out", out, device, same)
    return dtype


def reference(gate: Tensor, up: Tensor | None, out: Tensor, act: str) -> None:
    """The meaning of the op in plain PyTorch: 16-bit values are upcast and rounded once at the end."""
    wide = gate if gate.dtype is torch.float64 else gate.float()
    if act == "silu":
        value = F.silu(wide)
    elif act == "relu":
        value = F.relu(wide)
    else:
        value = F.gelu(wide, approximate="tanh" if act == "gelu_tanh" else "none")
    out.copy_(value if up is None else value * up)


def _as_rows(gate: Tensor, up: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The operands as the kernels take them; inputs are copied where their strides forbid a view."""
    out_rows = _rows(out)
    if out_rows is None:
        raise InputError(
            f"out: expected rows at one distance with a contiguous last dimension, got strides {out.stride()}"
        )
    gate_rows = _rows(gate)
    if gate_rows is None:
        gate_rows = gate.reshape(-1, gate.shape[-1]).contiguous()
    up_rows = None if up is None else _rows(up)
    if up is not None and up_rows is None:
        up_rows = up.reshape(-1, up.shape[-1]).contiguous()
    return gate_rows, up_rows, out_rows


def _cpu(gate: Tensor, up: Tensor | None, out: Tensor, act: str) -> None:
    _native.C.gated_act_cpu(*_as_rows(gate, up, out), act=act, threads=_native.threads())


def _cuda(gate: Tensor, up: Tensor | None, out: Tensor, act: str) -> None:
    _native.launch("gated_act_cuda", *_as_rows(gate, up, out), act=act)


_op = define(
    "gated_act",
    '(Tensor gate, Tensor? up, Tensor(a!) out, str act, *, str backend="auto") -> ()',
    _check,
    {
        "cpu": Backend(_cpu, ("cpu",), _native.why_not_cpu),
        "cuda": Backend(_cuda, ("cuda",), _native.why_not_cuda),
        "reference": Backend(reference),
    },
)


def gated_act(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Activate the gate of an MLP and multiply by its up projection.

    out = act(gate) * up, or act(gate) where up is None; act is
    silu: x / (1 + exp(-x));  gelu: x * (1 + erf(x / sqrt 2)) / 2;
    gelu_tanh: x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2;  relu: max(x, 0).

    Args:
        gate: [..., d_mlp], at least two dimensions, fp64/fp32/fp16/bf16. Rows may be strided, as the halves
            of a fused gate-and-up projection are.
        up: the same shape and dtype, or None.
        act: one of `ACTS`.
        out: where to write: gate itself, up itself, or a tensor of that shape and dtype that overlaps neither.
        backend: "auto", or a name of the registry.
    Returns:
        [..., d_mlp] in the dtype of gate.
    Raises:
        InputError: a shape, dtype, device or name differs from the above; the message names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        16-bit inputs are computed in fp32 and rounded once (PyTorch's two calls round twice). Bitwise repeatable.
    References: Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    expect_tensor("gate", gate)
    expect_no_grad("gated_act", gate, up, out)
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _op(gate, up, out, act, backend=backend)
    return out
