"""out[v, b, h] = softmax over the shared keys of prompt b and END's own key of row (v, b, h), times the values

Ownership: one program = one prompt, one kv head, BLOCK_ROWS of the rows (variant, query head of the group); it owns
those rows of `out`. It walks the prefix in tiles of BLOCK_KEYS and reads each key and value once for all its rows;
programs of the same prefix follow each other, so that the other blocks of rows find it in L2.
Start: the running softmax begins with END's own key (maximum = its score, sum = 1, acc = its value), so an empty prefix
needs no case of its own and the maximum is never that of an empty set.
Traffic: k and v once per block of rows; q, k_own, v_own and out once. FLOP: 4 d_head per row and key, in tensor cores
for 16-bit inputs: BLOCK_ROWS FLOP per byte of the prefix, against 1 where every variant holds its own copy.
Accumulation: fp32 scores, softmax and sums; 16-bit shares are rounded to the dtype of v before their product with it.
Repeatable bitwise: no atomics, a fixed order of the keys.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the parameters of a kernel have no Python types)

import torch
import triton
import triton.language as tl

from pyarith.ops._triton._launch import IEEE_ROWS, INTERPRETED, MATRIX_DTYPES, Launch, blocks, power_of_2, strides
from pyarith.ops._triton._math import dot, softcapped

_NO_WINDOW = 2**31 - 1


@triton.jit(do_not_specialize=["n_variants", "n_batch", "n_pos", "n_kv_heads", "group", "window"])
def _shared_prefix_attention(
    q,
    k,
    v,
    k_own,
    v_own,
    lengths,
    out,
    n_variants,
    n_batch,
    n_pos,
    n_kv_heads,
    group,
    d_head,
    window,
    scale,
    softcap,
    q_variant,
    q_batch,
    q_head,
    q_d,
    k_batch,
    k_pos,
    k_head,
    k_d,
    v_batch,
    v_pos,
    v_head,
    v_d,
    k_own_variant,
    k_own_batch,
    k_own_head,
    k_own_d,
    v_own_variant,
    v_own_batch,
    v_own_head,
    v_own_d,
    lengths_batch,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(n_variants * group, BLOCK_ROWS)
    row = (program % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # 64-bit before any product with a stride
    kv_head = (program // row_blocks % n_kv_heads).to(tl.int64)
    batch = (program // (row_blocks * n_kv_heads)).to(tl.int64)
    variant = (row // group).to(tl.int64)
    head = kv_head * group + row % group
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    d_here = d < d_head
    here = (row[:, None] < n_variants * group) & d_here[None, :]

    query = tl.load(
        q + variant[:, None] * q_variant + batch * q_batch + head[:, None] * q_head + d[None, :] * q_d,
        mask=here,
        other=0.0,
    )
    own_key = tl.load(
        k_own + variant[:, None] * k_own_variant + batch * k_own_batch + kv_head * k_own_head + d[None, :] * k_own_d,
        mask=here,
        other=0.0,
    )
    own_value = tl.load(
        v_own + variant[:, None] * v_own_variant + batch * v_own_batch + kv_head * v_own_head + d[None, :] * v_own_d,
        mask=here,
        other=0.0,
    )
    top = softcapped(scale * tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1), softcap, CAPPED)
    total = tl.full((BLOCK_ROWS,), 1.0, dtype=tl.float32)
    acc = own_value.to(tl.float32)

    length = tl.load(lengths + batch * lengths_batch)
    first = tl.minimum(tl.maximum(length - window + 1, 0), n_pos)
    last = tl.minimum(length, n_pos).to(tl.int32)
    k_start = k + batch * k_batch + kv_head * k_head
    v_start = v + batch * v_batch + kv_head * v_head
    step = tl.arange(0, BLOCK_KEYS)
    for start in range((first // BLOCK_KEYS * BLOCK_KEYS).to(tl.int32), last, BLOCK_KEYS):
        pos = start + step
        pos_here = (pos >= first) & (pos < last)
        pos = pos.to(tl.int64)
        key = tl.load(
            k_start + pos[None, :] * k_pos + d[:, None] * k_d, mask=pos_here[None, :] & d_here[:, None], other=0.0
        )
        value = tl.load(
            v_start + pos[:, None] * v_pos + d[None, :] * v_d, mask=pos_here[:, None] & d_here[None, :], other=0.0
        )
        products = dot(query, key, tl.zeros((BLOCK_ROWS, BLOCK_KEYS), dtype=tl.float32), UPCAST)
        score = softcapped(scale * products, softcap, CAPPED)
        score = tl.where(pos_here[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        share = tl.exp(score - new_top[:, None])
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(share, 1)
        acc = dot(share.to(value.dtype), value, acc * rescale[:, None], UPCAST)
        top = new_top
    n_heads = n_kv_heads * group
    place = ((variant[:, None] * n_batch + batch) * n_heads + head[:, None]) * d_head + d[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_own: torch.Tensor,
    v_own: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Launch:
    """The launch for these tensors; depends on shapes, strides and dtypes only."""
    n_variants, n_batch, n_heads, d_head = q.shape
    n_pos, n_kv_heads = k.shape[1:3]
    group = n_heads // max(n_kv_heads, 1)
    matrix = q.dtype in MATRIX_DTYPES
    block_d = power_of_2(d_head, 16, 2**20)
    # rows x d_head and keys x d_head are kept about constant: what registers and shared memory hold
    most = min(128, 16384 // block_d) if matrix else min(IEEE_ROWS, 4096 // block_d)
    keys = min(64 if block_d <= 64 else 32, 8192 // block_d) if matrix else min(32, 2048 // block_d)
    rows = power_of_2(n_variants * group, 16, max(16, most))
    return Launch(
        _shared_prefix_attention,
        programs=n_batch * n_kv_heads * blocks(n_variants * group, rows),
        arguments=dict(
            q=q,
            k=k,
            v=v,
            k_own=k_own,
            v_own=v_own,
            lengths=lengths,
            out=out,
            n_variants=n_variants,
            n_batch=n_batch,
            n_pos=n_pos,
            n_kv_heads=n_kv_heads,
            group=group,
            d_head=d_head,
            window=window or _NO_WINDOW,
            scale=scale,
            softcap=softcap,
            **strides("q", q, "variant", "batch", "head", "d"),
            **strides("k", k, "batch", "pos", "head", "d"),
            **strides("v", v, "batch", "pos", "head", "d"),
            **strides("k_own", k_own, "variant", "batch", "head", "d"),
            **strides("v_own", v_own, "variant", "batch", "head", "d"),
            **strides("lengths", lengths, "batch"),
            BLOCK_ROWS=rows,
            BLOCK_KEYS=max(16, keys),
            BLOCK_D=block_d,
            CAPPED=softcap > 0,
            UPCAST=INTERPRETED,
        ),
        num_warps=8 if rows * block_d >= 128 * 64 else 4,
        num_stages=3 if matrix and block_d <= 128 else 2,
    )


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_own: torch.Tensor,
    v_own: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """Fill ``out``; arguments as in the op's schema."""
    plan(q, k, v, k_own, v_own, lengths, out, scale, softcap, window).start(out)
