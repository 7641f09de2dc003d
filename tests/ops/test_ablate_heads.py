"""ablate_heads: by hand, equality with torch.where, in place, refusals. On a GPU the kernel against the same."""

import pytest
import torch
from cases import make, misaligned, name_of, needs_cuda

from pyarith import ops
from pyarith.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BASELINES = (None, (1, 1), (1, "pos"), ("batch", 1), ("batch", "pos"))
BACKENDS = ("reference", pytest.param("cuda", marks=needs_cuda))


def test_by_hand():
    # 2 variants of one clean z with heads (1, 2) and (3, 4): the second variant replaces the second head
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None, None].expand(2, 1, 1, 2, 2)
    ablate = torch.tensor([[False, False], [False, True]])
    assert ops.ablate_heads(z, ablate).flatten().tolist() == [1, 2, 3, 4, 1, 2, 0, 0]
    baseline = torch.tensor([[[[5.0, 6.0], [7.0, 8.0]]]])
    assert ops.ablate_heads(z, ablate, baseline).flatten().tolist() == [1, 2, 3, 4, 1, 2, 7, 8]


def drawn(variant, head):
    """Which heads to replace: none in the first variant, all in the last, a random half in the others."""
    ablate = torch.rand(variant, head, generator=torch.Generator().manual_seed(0)) < 0.5
    ablate[0], ablate[-1] = False, True
    return ablate


def problem(dtype, d_head, baseline, expanded, sizes=(3, 2, 4, 3)):
    variant, batch, pos, head = sizes
    z = make(1 if expanded else variant, batch, pos, head, d_head, dtype=dtype)
    z.view(-1)[0] = torch.nan  # a replaced NaN must be gone, a kept one must stay
    if baseline is not None:
        known = dict(batch=batch, pos=pos)
        baseline = make(*(known.get(size, size) for size in baseline), head, d_head, dtype=dtype, seed=1)
        baseline.view(-1)[-1] = torch.inf
    return z, drawn(variant, head), baseline


def expected(z, ablate, baseline):
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return torch.where(ablate[:, None, None, :, None], zero if baseline is None else baseline, z)


def same_bits(a, b):
    same = a.dtype is b.dtype and a.shape == b.shape
    return same and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("d_head", (1, 3, 8, 64))
@pytest.mark.parametrize("baseline", BASELINES, ids=str)
@pytest.mark.parametrize("expanded", (False, True), ids=("own", "expanded"))
def test_equals_where(backend, dtype, d_head, baseline, expanded):
    if backend == "cuda" and dtype is torch.float64:
        pytest.skip("the CUDA kernels have no fp64")
    device = "cuda" if backend == "cuda" else "cpu"
    plain = problem(dtype, d_head, baseline, expanded)
    for place in (lambda t: t.to(device), lambda t: misaligned(t.to(device))):
        z, ablate, baseline = (None if t is None else place(t) for t in plain)
        z = z.expand(len(ablate), *z.shape[1:])
        oracle = expected(z, ablate, baseline)
        out = place(torch.full_like(oracle, torch.nan))
        for _ in range(3):
            assert ops.ablate_heads(z, ablate, baseline, out=out, backend=backend) is out
            assert same_bits(out, oracle)
        assert same_bits(ops.ablate_heads(z, ablate, baseline, backend=backend), oracle)
        if not expanded:
            assert ops.ablate_heads(z, ablate, baseline, out=z, backend=backend) is z
            assert same_bits(z, oracle)


@needs_cuda
@pytest.mark.parametrize("sizes", ((5, 7, 13, 32), (2, 1, 1, 1)), ids=str)
def test_cuda_many_heads_and_positions(sizes):
    # 32 heads of 128 are more than a block takes in one step
    z, ablate, baseline = (t.cuda() for t in problem(torch.bfloat16, 128, ("batch", "pos"), False, sizes))
    oracle = expected(z, ablate, baseline)
    assert same_bits(ops.ablate_heads(z, ablate, baseline, backend="cuda"), oracle)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_positions(backend):
    # the heads' part of a fused projection, and every second position of a longer baseline
    device = "cuda" if backend == "cuda" else "cpu"
    fused, stored, ablate = make(2, 3, 5, 4 * 8 + 16).to(device), make(3, 10, 4, 8).to(device), drawn(2, 4).to(device)
    z, baseline = fused[..., :32].unflatten(-1, (4, 8)), stored[:, ::2]
    assert same_bits(ops.ablate_heads(z, ablate, baseline, backend=backend), expected(z, ablate, baseline))
    turned = make(3, 5, 8, 4).to(device).transpose(-1, -2)  # gaps inside of a head
    assert same_bits(ops.ablate_heads(z, ablate, turned, backend=backend), expected(z, ablate, turned))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    for shape in ((0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 3, 4, 0)):
        z, ablate = torch.empty(shape, device=device), torch.zeros(shape[0], shape[3], dtype=torch.bool, device=device)
        assert ops.ablate_heads(z, ablate, backend=backend).shape == shape


def test_nothing_ablated_is_the_identity_and_own_values_change_nothing():
    z = make(2, 2, 3, 4, 8)
    assert same_bits(ops.ablate_heads(z, torch.zeros(2, 4, dtype=torch.bool)), z)
    clean = make(2, 3, 4, 8)
    every = torch.ones(2, 4, dtype=torch.bool)
    assert same_bits(ops.ablate_heads(clean.expand(2, 2, 3, 4, 8), every, clean), clean.expand(2, 2, 3, 4, 8).clone())


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(z=make(2, 3, 4, 8)), "z: expected [variant, batch, pos, head, d_head], got shape (2, 3, 4, 8)"),
        (dict(z=torch.ones(2, 3, 5, 4, 8, dtype=torch.int32)), "z: expected dtype"),
        (dict(z=make(2, 3, 5, 8, 4).transpose(3, 4)), "z: expected contiguous last dimensions [head, d_head]"),
        (dict(z=make(2, 3, 4, 5, 8).transpose(2, 3)), "z: expected contiguous last dimensions [head, d_head]"),
        (dict(ablate=drawn(3, 4)), "ablate: expected shape [variant, head] = (2, 4), got (3, 4)"),
        (dict(ablate=torch.ones(2, 4)), "ablate: expected dtype bool; got float32"),
        (dict(baseline=make(5, 4, 8)), "baseline: expected [batch or 1, pos or 1, head, d_head], got shape (5, 4, 8)"),
        (
            dict(baseline=make(2, 5, 4, 8)),
            "baseline: expected shape [batch or 1, pos or 1, head, d_head] = (3, 5, 4, 8), got (2, 5, 4, 8)",
        ),
        (dict(baseline=make(3, 4, 4, 8)), "= (3, 5, 4, 8), got (3, 4, 4, 8)"),
        (dict(baseline=make(3, 5, 4, 7)), "= (3, 5, 4, 8), got (3, 5, 4, 7)"),
        (dict(baseline=make(1, 1, 4, 8, dtype=torch.bfloat16)), "baseline: expected dtype float32; got bfloat16"),
        (dict(out=torch.empty(2, 3, 5, 4, 7)), "out: expected shape that of z"),
        (dict(out=torch.empty(2, 3, 5, 4, 8, dtype=torch.float64)), "out: expected dtype float32; got float64"),
        (dict(out=torch.empty(3, 5, 4, 8).expand(2, 3, 5, 4, 8)), "out: expected a contiguous tensor"),
        (dict(z=make(2, 3, 5, 4, 8).requires_grad_()), "ablate_heads has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    with pytest.raises(InputError) as caught:
        ops.ablate_heads(**(dict(z=make(2, 3, 5, 4, 8), ablate=drawn(2, 4)) | changed))
    assert words in str(caught.value)
