"""`vocab_logsumexp`: the normaliser of the log-probabilities, over the whole vocabulary."""

from __future__ import annotations

import torch

from pyarith.errors import InputError
from pyarith.ops import _native
from pyarith.ops._contract import (
    FLOATS,
    WIDE,
    expect_dims,
    expect_like,
    expect_no_grad,
    expect_shape,
    expect_tensor,
)
from pyarith.ops._registry import Backend, define
from pyarith.ops._triton import why_not as why_not_triton
from pyarith.ops.answer_logits import softcapped

Tensor = torch.Tensor

_ELEMENTS = 2**24  # logits, and weights widened for them, that are held at a time
_MOST_TOKENS = 2048
_LEAST_TOKENS = 256


def chunk_tokens(rows: int, d_model: int) -> int:
    """Tokens at a time of the plain implementation."""
    return max(_LEAST_TOKENS, min(_MOST_TOKENS, _ELEMENTS // max(rows, d_model, 1)))


def scratch_bytes(rows: int, d_vocab: int, d_model: int, dtype: torch.dtype, wide: torch.dtype) -> int:
    """What the plain implementation holds at most: logits and two results of theirs, and a chunk of widened weights."""
    widened = 0 if dtype is wide else d_model
    return min(chunk_tokens(rows, d_model), d_vocab) * (3 * rows + widened) * wide.itemsize


def _check(
    normed: Tensor, unembed: Tensor, bias: Tensor | None, out: Tensor, scale: float, softcap: float
) -> torch.dtype:
    device = normed.device
    expect_dims("normed", normed, 2, "[rows, d_model]")
    expect_like("normed", normed, device, FLOATS)
    expect_dims("unembed", unembed, 2, "[d_vocab, d_model]")
    expect_shape("unembed", unembed, (unembed.shape[0], normed.shape[1]), "[d_vocab, d_model]")
    expect_like("unembed", unembed, device, FLOATS)
    if bias is not None:
        expect_shape("bias", bias, unembed.shape[:1], "[d_vocab]")
        expect_like("bias", bias, device, FLOATS)
    if softcap < 0:
        raise InputError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    expect_shape("out", out, normed.shape[:1], "[rows]")
    expect_like("out", out, device, WIDE)
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    return out.dtype


def reference(normed: Tensor, unembed: Tensor, bias: Tensor | None, out: Tensor, scale: float, softcap: float) -> None:
    """The meaning of the op in plain PyTorch, chunk by chunk: vendor products in the dtype of ``out``."""
    rows = normed.to(out.dtype)
    chunk = chunk_tokens(*normed.shape)
    out.fill_(-torch.inf)
    for start in range(0, unembed.shape[0], chunk):
        logits = scale * (rows @ unembed[start : start + chunk].to(out.dtype).T)
        if bias is not None:
            logits = logits + bias[start : start + chunk].to(out.dtype)
        torch.logaddexp(out, softcapped(logits, softcap).logsumexp(-1), out=out)


def _triton(normed: Tensor, unembed: Tensor, bias: Tensor | None, out: Tensor, scale: float, softcap: float) -> None:
    from pyarith.ops._triton.vocab_logsumexp import launch

    launch(normed, unembed, bias, out, scale, softcap)


_op = define(
    "vocab_logsumexp",
    "(Tensor normed, Tensor unembed, Tensor? bias, Tensor(a!) out, float scale, float softcap, *, "
    'str backend="auto") -> ()',
    _check,
    {
        "cpu": Backend(reference, ("cpu",)),
        "triton": Backend(_triton, ("cuda",), why_not_triton),
        "cuda": Backend(reference, ("cuda",), _native.why_not_cuda),
        "reference": Backend(reference),
    },
)


def vocab_logsumexp(
    normed: Tensor,
    unembed: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-sum-exp of the logits of each row over the whole vocabulary; no [rows, d_vocab] is ever held.

    out[r] = log sum_t exp(cap(scale * (normed[r] . unembed[t]) + bias[t])), cap as in `answer_logits`.

    Args:
        normed: normalised rows, [rows, d_model], any float dtype.
        unembed: [d_vocab, d_model], any float dtype.
        bias: [d_vocab] or None.
        scale, softcap: the model's logit scale and softcap (0 = none).
        out: where to write, [rows], contiguous, fp32 or fp64.
        backend: "auto", or a name of the registry.
    Returns:
        [rows], fp64 if normed or unembed is, else fp32.
    Raises:
        InputError: a shape, dtype, device or name differs from the above; the message names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        Products are accumulated and kept in fp32 (fp64 for an fp64 result): 16-bit inputs are exact factors.
        On a GPU the Triton kernel runs where triton is installed (tensor cores where normed and unembed are of one
        16-bit dtype), else vendor products chunk by chunk, which need an fp32 copy of each chunk. Bitwise repeatable.
    """
    expect_tensor("normed", normed)
    expect_tensor("unembed", unembed)
    expect_no_grad("vocab_logsumexp", normed, unembed, bias, out)
    if out is None:
        expect_dims("normed", normed, 2, "[rows, d_model]")
        wide = torch.float64 if torch.float64 in (normed.dtype, unembed.dtype) else torch.float32
        out = torch.empty(normed.shape[:1], dtype=wide, device=normed.device)
    _op(normed, unembed, bias, out, scale, softcap, backend=backend)
    return out
