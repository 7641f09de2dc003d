"""`shared_prefix_attention`: END's attention in every variant over one copy of the clean keys and values."""

from __future__ import annotations

import torch

from pyarith.errors import InputError
from pyarith.ops._contract import FLOATS, expect_dims, expect_like, expect_no_grad, expect_shape, expect_tensor
from pyarith.ops._registry import Backend, define
from pyarith.ops._triton import why_not as why_not_triton
from pyarith.ops.answer_logits import softcapped

Tensor = torch.Tensor

_INT64 = frozenset((torch.int64,))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lengths: Tensor,
    out: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.dtype:
    expect_dims("q", q, 4, "[variant, batch, head, d_head]")
    expect_dims("k", k, 4, "[batch, pos, kv_head, d_head]")
    device, dtype = q.device, q.dtype
    expect_like("q", q, device, FLOATS)
    variant, batch, head, d_head = q.shape
    pos, kv_head = k.shape[1:3]
    if head % kv_head if kv_head else head:
        raise InputError(f"k: expected a number of kv heads that divides the {head} heads of q, got {kv_head}")
    same = frozenset((dtype,))
    for name, tensor in (("k", k), ("v", v)):
        expect_shape(name, tensor, (batch, pos, kv_head, d_head), "[batch, pos, kv_head, d_head]")
        expect_like(name, tensor, device, same)
    for name, tensor in (("k_own", k_own), ("v_own", v_own)):
        expect_shape(name, tensor, (variant, batch, kv_head, d_head), "[variant, batch, kv_head, d_head]")
        expect_like(name, tensor, device, same)
    expect_shape("lengths", lengths, (batch,), "[batch]")
    expect_like("lengths", lengths, device, _INT64)
    if softcap < 0:
        raise InputError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    if not 0 <= window < 2**31:
        raise InputError(f"window: expected 0 (none) or a positive number of keys below 2^31, got {window}")
    expect_shape("out", out, q.shape, "[variant, batch, head, d_head]")
    expect_like("out", out, device, same)
    if not out.is_contiguous():
        raise InputError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    return dtype


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lengths: Tensor,
    out: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """The meaning of the op in plain PyTorch: 16-bit values are upcast and rounded once at the end."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    variant, batch, head, d_head = q.shape
    n_pos, kv_head = k.shape[1:3]
    query = q.to(wide).reshape(variant, batch, kv_head, head // max(kv_head, 1), d_head)
    shared = torch.einsum("vbhgd,bphd->vbhgp", query, k.to(wide))
    own = torch.einsum("vbhgd,vbhd->vbhg", query, k_own.to(wide))
    pos, length = torch.arange(n_pos, device=q.device), lengths[:, None]
    seen = pos < length
    if window:
        seen &= length - pos < window
    shared = softcapped(scale * shared, softcap).masked_fill(~seen[:, None, None], -torch.inf)
    own = softcapped(scale * own, softcap)
    weight = torch.cat([shared, own[..., None]], -1).softmax(-1)
    # what lies past a length is not read, and 0 times a NaN there would be one
    value = v.to(wide).masked_fill(~seen[:, :, None, None], 0.0)
    result = torch.einsum("vbhgp,bphd->vbhgd", weight[..., :-1], value)
    out.copy_((result + weight[..., -1:] * v_own.to(wide)[:, :, :, None]).reshape(q.shape))


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lengths: Tensor,
    out: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    from pyarith.ops._triton.shared_prefix_attention import launch

    launch(q, k, v, k_own, v_own, lengths, out, scale, softcap, window)


_op = define(
    "shared_prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor k_own, Tensor v_own, Tensor lengths, Tensor(a!) out, float scale, "
    'float softcap, int window, *, str backend="auto") -> ()',
    _check,
    {"triton": Backend(_triton, ("cuda",), why_not_triton), "reference": Backend(reference)},
)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one query per variant and prompt (END's) over keys that all variants share, plus its own key.

    For query head h, kv head j = h // (n_heads // n_kv_heads) and the positions p < lengths[b] (with a window, only
    those with lengths[b] - p < window):

    s[p] = cap(scale * (q[v, b, h] . k[b, p, j]));  s[own] = cap(scale * (q[v, b, h] . k_own[v, b, j]))
    out[v, b, h] = sum_p softmax(s)[p] v[b, p, j] + softmax(s)[own] v_own[v, b, j]

    with cap(x) = softcap * tanh(x / softcap) where softcap > 0, else x; the softmax runs over the p and own together.

    Args:
        q: END's queries, [variant, batch, head, d_head], fp64/fp32/fp16/bf16.
        k, v: the clean run's keys and values, [batch, pos, kv_head, d_head], any strides (fast with a contiguous last
            dimension): a cache [batch, kv_head, pos, d_head] is passed as its ``transpose(1, 2)``.
        k_own, v_own: END's own key and value, [variant, batch, kv_head, d_head].
        lengths: END's position, int64 [batch]: the keys 0 .. lengths[b] - 1 are real; may be 0. Not checked, since
            that would wait for the device: below 0 counts as 0, and no key beyond pos is read.
        scale: the model's score scale, usually d_head ** -0.5.
        softcap: the model's attention softcap (0 = none).
        window: keys that END sees, itself included, as transformers counts a sliding window (0 = all).
        out: where to write, [variant, batch, head, d_head], contiguous, in the dtype of q.
        backend: "auto", or a name of the registry.
    Returns:
        [variant, batch, head, d_head] in the dtype of q.
    Raises:
        InputError: a shape, dtype or device differs from the above (all floats have the dtype of q); the message
            names the argument.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        What END's ablation with everything downstream recomputed needs at each later layer: a one-token decode on the
        clean prefix's cache, for all variants at once. Scores and softmax are fp32 (fp64 for fp64). Bitwise repeatable.
    References: Juravsky et al. 2024, arXiv:2402.05099 (shared prefixes); Milakov and Gimelshein 2018,
        arXiv:1805.02867 (online softmax).
    """
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_own", k_own), ("v_own", v_own), ("lengths", lengths)):
        expect_tensor(name, tensor)
    expect_no_grad("shared_prefix_attention", q, k, v, k_own, v_own, out)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _op(q, k, v, k_own, v_own, lengths, out, scale, softcap, window, backend=backend)
    return out
