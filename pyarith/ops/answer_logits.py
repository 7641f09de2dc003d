"""`answer_logits`: final norm and a few unembedding rows per prompt."""

from __future__ import annotations

import torch

from pyarith.errors import InputError
from pyarith.ops import _native
from pyarith.ops._contract import FLOATS, expect_dims, expect_like, expect_no_grad, expect_shape, expect_tensor
from pyarith.ops._registry import Backend, define
from pyarith.ops.add_norm import _CPU_READS, _CUDA_READS, _F32, _upcast, check_norm, normalise

Tensor = torch.Tensor


def _check(
    row: Tensor,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target_rows: Tensor,
    target_bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
    scale: float,
    softcap: float,
) -> torch.dtype:
    dtype = check_norm(row, write, weight, bias, kind)
    variant, batch, d_model = row.shape
    expect_dims("target_rows", target_rows, 3, "[batch, k, d_model]")
    k = target_rows.shape[1]
    expect_shape("target_rows", target_rows, (batch, k, d_model), "[batch, k, d_model]")
    expect_like("target_rows", target_rows, row.device, FLOATS)
    if target_bias is not None:
        expect_shape("target_bias", target_bias, (batch, k), "[batch, k]")
        expect_like("target_bias", target_bias, row.device, FLOATS)
    if softcap < 0:
        raise InputError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    expect_shape("out", out, (variant, batch, k), "[variant, batch, k]")
    expect_like("out", out, row.device, frozenset((dtype,)))
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    return dtype


def reference(
    row: Tensor,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target_rows: Tensor,
    target_bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
    scale: float,
    softcap: float,
) -> None:
    """The meaning of the op in plain PyTorch."""
    x = row if write is None else row + write.to(row.dtype)
    hidden = normalise(x, weight, bias, eps, kind)
    # one target at a time, as a sum: einsum adds up a single column serially (14 times the error at d_model 4096),
    # and all targets at once would hold [variant, batch, target, d_model]
    targets = target_rows.to(row.dtype).unbind(1)
    logits = torch.stack([(hidden * target).sum(-1) for target in targets], -1) if targets else out.new_zeros(out.shape)
    logits = scale * logits
    if target_bias is not None:
        logits = logits + target_bias.to(row.dtype)
    out.copy_(softcapped(logits, softcap))


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits where softcap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def _cpu(
    row: Tensor,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target_rows: Tensor,
    target_bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
    scale: float,
    softcap: float,
) -> None:
    _native.C.answer_logits_cpu(
        row.contiguous(),
        _upcast(write, _F32),
        _upcast(weight, _CPU_READS),
        _upcast(bias, _CPU_READS),
        _upcast(target_rows, _CPU_READS),
        _upcast(target_bias, _F32),
        out,
        eps=eps,
        kind=kind,
        scale=scale,
        softcap=softcap,
        threads=_native.threads(),
    )


def _cuda(
    row: Tensor,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target_rows: Tensor,
    target_bias: Tensor | None,
    out: Tensor,
    eps: float,
    kind: str,
    scale: float,
    softcap: float,
) -> None:
    _native.launch(
        "answer_logits_cuda",
        row.contiguous(),
        _upcast(write, _F32),
        _upcast(weight, _CUDA_READS),
        _upcast(bias, _CUDA_READS),
        _upcast(target_rows, _CUDA_READS),
        _upcast(target_bias, _F32),
        out,
        eps=eps,
        kind=kind,
        scale=scale,
        softcap=softcap,
    )


_op = define(
    "answer_logits",
    "(Tensor row, Tensor? write, Tensor weight, Tensor? bias, Tensor target_rows, Tensor? target_bias, "
    'Tensor(a!) out, float eps, str kind, float scale, float softcap, *, str backend="auto") -> ()',
    _check,
    {
        "cpu": Backend(_cpu, ("cpu",), _native.why_not_cpu),
        "cuda": Backend(_cuda, ("cuda",), _native.why_not_cuda),
        "reference": Backend(reference),
    },
)


def answer_logits(
    row: Tensor,
    write: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    target_rows: Tensor,
    target_bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logits of a few tokens per prompt from the final residual rows of all variants.

    h = norm(row[v, b] + write[b]);  out[v, b, k] = cap(scale * (h . target_rows[b, k]) + target_bias[b, k])
    with cap(x) = softcap * tanh(x / softcap) where softcap > 0, else x.

    Args:
        row: residual rows, [variant, batch, d_model], fp32 or fp64. Not mutated.
        write: addend shared by the variants, [batch, d_model], any float dtype, or None.
        weight, bias, eps, kind: the final norm, as in `add_norm`.
        target_rows: unembedding rows of the tokens asked for, [batch, k, d_model], any float dtype.
        target_bias: unembedding bias of those tokens, [batch, k], or None.
        scale, softcap: the model's logit scale and softcap (0 = none).
        out: where to write, [variant, batch, k], contiguous, in the dtype of row.
        backend: "auto", or a name of the registry.
    Returns:
        [variant, batch, k] in the dtype of row.
    Raises:
        InputError: a shape, dtype, device or name differs from the above; the message names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        Nothing is rounded to 16 bits on the way, and no [rows, d_vocab] exists. Bitwise repeatable.
    """
    expect_tensor("row", row)
    expect_tensor("target_rows", target_rows)
    expect_no_grad("answer_logits", row, write, weight, bias, target_rows, target_bias, out)
    if out is None:
        expect_dims("row", row, 3, "[variant, batch, d_model]")
        expect_dims("target_rows", target_rows, 3, "[batch, k, d_model]")
        out = torch.empty((row.shape[0], row.shape[1], target_rows.shape[1]), dtype=row.dtype, device=row.device)
    _op(row, write, weight, bias, target_rows, target_bias, out, eps, kind, scale, softcap, backend=backend)
    return out
