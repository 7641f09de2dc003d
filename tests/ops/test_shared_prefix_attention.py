"""shared_prefix_attention: by hand, against one list of keys per row in fp64, a cache's view, windows, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import make, name_of
from tolerances import assert_within_rule, error

from pyarith import ops
from pyarith.errors import InputError


def inputs(variants=3, batch=3, heads=4, kv_heads=2, d_head=5, pos=7, dtype=torch.float64, lengths=(7, 0, 3)):
    q, k_own = make(variants, batch, heads, d_head, dtype=dtype), make(variants, batch, kv_heads, d_head, dtype=dtype)
    k = make(batch, kv_heads, pos, d_head, dtype=dtype).transpose(1, 2)  # the view of a cache
    v, v_own = make(batch, pos, kv_heads, d_head, dtype=dtype, seed=1), make(*k_own.shape, dtype=dtype, seed=1)
    return [q, k, v, k_own, v_own, torch.tensor(lengths, dtype=torch.int64)]


def test_by_hand():
    # two shared keys with scores log 1 and log 2, END's own with log 3; values 10, 20, 30
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(2), 9.0]).view(1, 3, 1, 1)
    v = torch.tensor([10.0, 20.0, math.nan]).view(1, 3, 1, 1)  # the third lies past the length
    k_own, v_own = torch.full((1, 1, 1, 1), math.log(3)), torch.full((1, 1, 1, 1), 30.0)

    def attention(length, **options):
        lengths = torch.tensor([length])
        return ops.shared_prefix_attention(q, k, v, k_own, v_own, lengths, **(dict(scale=1.0) | options)).item()

    assert attention(2) == pytest.approx((1 * 10 + 2 * 20 + 3 * 30) / 6)
    assert attention(2, window=2) == pytest.approx((2 * 20 + 3 * 30) / 5)
    assert attention(2, window=1) == attention(0) == attention(-1) == 30
    assert attention(2, scale=0.0) == pytest.approx(20)
    capped = [0.5 * math.tanh(math.log(x) / 0.5) for x in (1, 2, 3)]
    weights = [math.exp(x) for x in capped]
    assert attention(2, softcap=0.5) == pytest.approx(
        sum(w * x for w, x in zip(weights, (10, 20, 30), strict=True)) / sum(weights)
    )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_against_a_list_of_keys_for_every_row(dtype, kv_heads):
    q, k, v, k_own, v_own, lengths = inputs(kv_heads=kv_heads, dtype=dtype)
    expected = torch.empty(q.shape, dtype=torch.float64)
    plain = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        for variant in range(len(q)):
            keys, values = (
                torch.cat([shared[b, :length], own[variant, b][None]]).transpose(0, 1)
                for shared, own in ((k, k_own), (v, v_own))
            )
            query = q[variant, b][:, None]
            for out, cast in ((expected, torch.float64), (plain, dtype)):
                three = (t.to(cast)[None] for t in (query, keys, values))
                out[variant, b] = F.scaled_dot_product_attention(*three, scale=0.3, enable_gqa=True)[0, :, 0].to(out)
    out = torch.full_like(q, torch.nan)
    assert ops.shared_prefix_attention(q, k, v, k_own, v_own, lengths, scale=0.3, out=out) is out
    assert_within_rule(out, plain, expected)


@pytest.mark.parametrize("window", (1, 2, 3, 8, 9))
def test_the_window_is_that_of_transformers(window):
    from transformers.masking_utils import sliding_window_overlay

    q, k, v, k_own, v_own, lengths = inputs(kv_heads=4, lengths=(7, 7, 7))
    seen = torch.tensor([bool(sliding_window_overlay(window)(0, 0, 7, pos)) for pos in range(8)])
    keys, values = (
        torch.cat([shared.expand(len(q), *shared.shape), own[:, :, None]], 2).transpose(2, 3)
        for shared, own in ((k, k_own), (v, v_own))
    )
    expected = F.scaled_dot_product_attention(q[:, :, :, None], keys, values, attn_mask=seen[None], scale=1.0)
    out = ops.shared_prefix_attention(q, k, v, k_own, v_own, lengths, scale=1.0, window=window)
    assert error(out, expected[:, :, :, 0]) < 1e-14


def test_what_lies_past_a_length_is_not_read():
    q, k, v, k_own, v_own, lengths = inputs()
    expected = ops.shared_prefix_attention(q, k, v, k_own, v_own, lengths, scale=1.0)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:] = v[b, length:] = torch.nan
    assert torch.equal(ops.shared_prefix_attention(q, k, v, k_own, v_own, lengths, scale=1.0), expected)


@pytest.mark.parametrize("changed", (dict(variants=0), dict(batch=0, lengths=()), dict(d_head=0), dict(pos=0)), ids=str)
def test_empty(changed):
    tensors = inputs(**(dict(lengths=(0, 0, 0)) | changed))
    assert ops.shared_prefix_attention(*tensors, scale=1.0).shape == tensors[0].shape


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(q=make(3, 4, 5)), "q: expected [variant, batch, head, d_head], got shape (3, 4, 5)"),
        (dict(k=make(3, 7, 3, 5)), "k: expected a number of kv heads that divides the 4 heads of q, got 3"),
        (dict(k=make(2, 7, 2, 5)), "k: expected shape [batch, pos, kv_head, d_head] = (3, 7, 2, 5), got (2, 7, 2, 5)"),
        (dict(v=make(3, 6, 2, 5)), "v: expected shape [batch, pos, kv_head, d_head] = (3, 7, 2, 5), got (3, 6, 2, 5)"),
        (dict(v=make(3, 7, 2, 5, dtype=torch.bfloat16)), "v: expected dtype float32; got bfloat16"),
        (dict(k_own=make(3, 3, 4, 5)), "k_own: expected shape [variant, batch, kv_head, d_head] = (3, 3, 2, 5)"),
        (dict(v_own=make(3, 3, 2, 5).double()), "v_own: expected dtype float32; got float64"),
        (dict(lengths=torch.zeros(3, dtype=torch.int32)), "lengths: expected dtype int64; got int32"),
        (dict(lengths=torch.zeros(2, dtype=torch.int64)), "lengths: expected shape [batch] = (3,), got (2,)"),
        (dict(softcap=-1.0), "softcap: expected 0 (none) or a positive number, got -1.0"),
        (dict(window=-1), "window: expected 0 (none) or a positive number of keys below 2^31, got -1"),
        (dict(out=make(3, 4, 3, 5).transpose(1, 2)), "out: expected a contiguous tensor"),
        (dict(out=make(3, 3, 4, 5).double()), "out: expected dtype float32; got float64"),
        (dict(k=make(3, 7, 2, 5).requires_grad_()), "shared_prefix_attention has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    names = ("q", "k", "v", "k_own", "v_own", "lengths")
    known = dict(zip(names, inputs(dtype=torch.float32), strict=True), scale=1.0)
    with pytest.raises(InputError) as caught:
        ops.shared_prefix_attention(**(known | changed))
    assert words in str(caught.value)
