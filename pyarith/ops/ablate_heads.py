"""`ablate_heads`: replace the outputs of chosen heads, for a batch of variants at once."""

from __future__ import annotations

import torch

from pyarith.errors import InputError
from pyarith.ops import _native
from pyarith.ops._contract import FLOATS, expect_dims, expect_like, expect_no_grad, expect_shape, expect_tensor
from pyarith.ops._registry import Backend, define

Tensor = torch.Tensor


def _heads_contiguous(tensor: Tensor) -> bool:
    """Whether [head, d_head], the last two dimensions, lie in memory without gaps."""
    head, d_head = tensor.shape[-2:]
    return not tensor.numel() or (
        (d_head == 1 or tensor.stride(-1) == 1) and (head == 1 or tensor.stride(-2) == d_head)
    )


def _check(z: Tensor, ablate: Tensor, baseline: Tensor | None, out: Tensor) -> torch.dtype:
    expect_dims("z", z, 5, "[variant, batch, pos, head, d_head]")
    device, dtype = z.device, z.dtype
    expect_like("z", z, device, FLOATS)
    if not _heads_contiguous(z):
        raise InputError(f"z: expected contiguous last dimensions [head, d_head], got strides {z.stride()}")
    variant, batch, pos, head, d_head = z.shape
    expect_shape("ablate", ablate, (variant, head), "[variant, head]")
    expect_like("ablate", ablate, device, frozenset((torch.bool,)))
    same = frozenset((dtype,))
    if baseline is not None:
        expect_dims("baseline", baseline, 4, "[batch or 1, pos or 1, head, d_head]")
        shape = tuple(size if size == 1 else full for size, full in zip(baseline.shape, (batch, pos), strict=False))
        expect_shape("baseline", baseline, (*shape, head, d_head), "[batch or 1, pos or 1, head, d_head]")
        expect_like("baseline", baseline, device, same)
    expect_shape("out", out, z.shape, "that of z")
    expect_like("out", out, device, same)
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    return dtype


def reference(z: Tensor, ablate: Tensor, baseline: Tensor | None, out: Tensor) -> None:
    """The meaning of the op in plain PyTorch."""
    replaced = ablate[:, None, None, :, None]
    torch.where(replaced, z.new_zeros(()) if baseline is None else baseline, z, out=out)


def _cuda(z: Tensor, ablate: Tensor, baseline: Tensor | None, out: Tensor) -> None:
    if baseline is not None and not _heads_contiguous(baseline):
        baseline = baseline.contiguous()
    _native.launch("ablate_heads_cuda", z, ablate.contiguous(), baseline, out)


_op = define(
    "ablate_heads",
    '(Tensor z, Tensor ablate, Tensor? baseline, Tensor(a!) out, *, str backend="auto") -> ()',
    _check,
    {"cuda": Backend(_cuda, ("cuda",), _native.why_not_cuda), "reference": Backend(reference)},
)


def ablate_heads(
    z: Tensor,
    ablate: Tensor,
    baseline: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Knock out heads: their outputs before the output projection are replaced, each variant its own set of heads.

    out[v, b, p, h] = baseline[b, p, h] if ablate[v, h] else z[v, b, p, h]; without a baseline, 0.

    Args:
        z: the heads' outputs, [variant, batch, pos, head, d_head], fp32/bf16/fp16/fp64, the last two dimensions
            contiguous. An expanded view where all variants start from the same outputs.
        ablate: [variant, head], bool, True = replaced.
        baseline: [batch or 1, pos or 1, head, d_head] in the dtype of z, or None for zero.
        out: where to write, of the shape and dtype of z, contiguous: z itself (then only ablated heads are written)
            or a tensor that overlaps no input.
        backend: "auto", or a name of the registry.
    Returns:
        [variant, batch, pos, head, d_head] in the dtype of z.
    Raises:
        InputError: a shape, dtype, device or stride differs from the above; the message names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes: values are copied, never computed: bitwise the same on every backend.
    References: Wang et al. 2022, arXiv:2211.00593 (knock-outs).
    """
    expect_tensor("z", z)
    expect_tensor("ablate", ablate)
    expect_no_grad("ablate_heads", z, baseline, out)
    if out is None:
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _op(z, ablate, baseline, out, backend=backend)
    return out
