"""answer_logits: by hand, kernel against fp64, refusals."""

import math

import pytest
import torch
from cases import NATIVE, SIZES, make, misaligned, name_of, needs_cuda, plain_answer_logits
from tolerances import assert_within_rule

from pyarith import ops
from pyarith.errors import InputError

EPS = 1e-5


def test_reference_by_hand():
    # row (1, 2) + write (2, 2) = (3, 4), rms norm (3, 4) / sqrt(12.5), target (1, 1): 7 / sqrt(12.5)
    row, write = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64), torch.tensor([[2.0, 2.0]])
    target = torch.tensor([[[1.0, 1.0], [0.0, -1.0]]])
    bias = torch.tensor([[0.5, 0.25]])
    out = ops.answer_logits(row, write, torch.ones(2), None, 0.0, "rms", target, bias, scale=2.0, softcap=5.0)
    dots = (7 / 12.5**0.5, -4 / 12.5**0.5)
    expected = [5 * math.tanh((2 * dot + b) / 5) for dot, b in zip(dots, (0.5, 0.25), strict=True)]
    assert out.flatten().tolist() == pytest.approx(expected)
    assert row.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model", (*SIZES, 768))
@pytest.mark.parametrize("dtype", NATIVE, ids=name_of)
@pytest.mark.parametrize("k", (1, 3))
def test_kernel_against_fp64(kind, d_model, dtype, k):
    row, weight, targets = make(3, 5, d_model), make(d_model, dtype=dtype, seed=1), make(5, k, d_model, dtype=dtype)
    write = None if d_model == 3 else make(5, d_model, seed=3)
    bias = make(d_model, dtype=dtype, seed=4) if kind == "layer" else None
    target_bias = make(5, k, dtype=dtype, seed=5) if k == 3 else None
    scale, softcap = (0.25, 30.0) if d_model == 17 else (1.0, 0.0)
    plain = (row, write, weight, bias, EPS, kind, targets, target_bias, scale, softcap)
    oracle, eager = plain_answer_logits(torch.float64, *plain), plain_answer_logits(torch.float32, *plain)
    for place in (torch.Tensor.clone, misaligned):
        moved = [None if t is None else place(t) for t in (row, write, weight, bias, targets, target_bias)]
        out = ops.answer_logits(
            *moved[:4],
            EPS,
            kind,
            *moved[4:],
            scale=scale,
            softcap=softcap,
            out=torch.full((3, 5, k), torch.nan),
            backend="cpu",
        )
        assert torch.equal(moved[0], row), "row must not change"
        assert_within_rule(out, eager, oracle)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=name_of)
def test_other_dtypes(dtype):
    # fp64 rows step down to the reference; fp16 operands are upcast beside fp32 rows
    row = make(2, 3, 17, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    weight, targets = make(17, dtype=dtype), make(3, 2, 17, dtype=dtype)
    plain = (row, None, weight, None, EPS, "rms", targets, None, 1.0, 0.0)
    out = ops.answer_logits(row, None, weight, None, EPS, "rms", targets)
    assert out.dtype is row.dtype
    assert_within_rule(out, plain_answer_logits(row.dtype, *plain), plain_answer_logits(torch.float64, *plain))


def test_other_strides_are_right():
    row, targets = make(3, 2, 17).transpose(0, 1), make(17, 3, 2).permute(1, 2, 0)
    plain = (row, None, make(17), None, EPS, "rms", targets, None, 1.0, 0.0)
    out = ops.answer_logits(row, None, make(17), None, EPS, "rms", targets, backend="cpu")
    assert_within_rule(out, plain_answer_logits(torch.float32, *plain), plain_answer_logits(torch.float64, *plain))


@pytest.mark.parametrize("variant, batch, k, d_model", ((0, 2, 1, 3), (2, 0, 1, 3), (2, 2, 0, 3)))
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_empty(variant, batch, k, d_model, backend):
    targets = torch.empty(batch, k, d_model)
    row = torch.empty(variant, batch, d_model)
    out = ops.answer_logits(row, None, torch.ones(d_model), None, EPS, "rms", targets, backend=backend)
    assert out.shape == (variant, batch, k)


@needs_cuda
@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model", (*SIZES, 264, 768, 4096, 8192, 16384, 20000))
@pytest.mark.parametrize("dtype", (*NATIVE, torch.float16), ids=name_of)
@pytest.mark.parametrize("place", (torch.Tensor.cuda, lambda t: misaligned(t.cuda())), ids=("aligned", "misaligned"))
def test_cuda_kernel_against_fp64(kind, d_model, dtype, place):
    # 264 .. 16384 take the paths that keep a row in registers, odd sizes and 20000 the one that reads it again
    k = 1 if d_model == 768 else 3
    row, weight, targets = make(3, 5, d_model), make(d_model, dtype=dtype, seed=1), make(5, k, d_model, dtype=dtype)
    write = None if d_model == 3 else make(5, d_model, seed=3)
    bias = make(d_model, dtype=dtype, seed=4) if kind == "layer" else None
    target_bias = make(5, k, seed=5) if k == 3 else None
    scale, softcap = (1.0, 0.0) if d_model == 264 else (0.25, 30.0)
    plain = (row, write, weight, bias, EPS, kind, targets, target_bias, scale, softcap)
    oracle, eager = plain_answer_logits(torch.float64, *plain), plain_answer_logits(torch.float32, *plain)
    moved = [None if t is None else place(t) for t in (row, write, weight, bias, targets, target_bias)]
    results = []
    for _ in range(3):
        out = place(torch.full((3, 5, k), torch.nan))
        results.append(
            ops.answer_logits(
                *moved[:4], EPS, kind, *moved[4:], scale=scale, softcap=softcap, out=out, backend="cuda"
            ).cpu()
        )
    assert torch.equal(moved[0].cpu(), row), "row must not change"
    assert_within_rule(results[0], eager, oracle)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(target_rows=make(3, 17)), "target_rows: expected [batch, k, d_model], got shape (3, 17)"),
        (
            dict(target_rows=make(2, 1, 17)),
            "target_rows: expected shape [batch, k, d_model] = (3, 1, 17), got (2, 1, 17)",
        ),
        (dict(target_bias=make(3, 2)), "target_bias: expected shape [batch, k] = (3, 1), got (3, 2)"),
        (dict(softcap=-1.0), "softcap: expected 0 (none) or a positive number, got -1.0"),
        (dict(out=torch.empty(2, 3, 1, dtype=torch.float64)), "out: expected dtype float32; got float64"),
        (dict(write=make(17)), "write: expected shape [batch, d_model] = (3, 17), got (17,)"),
        (dict(weight=make(17).requires_grad_()), "answer_logits has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    known = dict(
        row=make(2, 3, 17), write=None, weight=make(17), bias=None, eps=EPS, kind="rms", target_rows=make(3, 1, 17)
    )
    with pytest.raises(InputError) as caught:
        ops.answer_logits(**(known | changed))
    assert words in str(caught.value)


def test_wide_rows_are_summed_carefully() -> None:
    """A serial sum over d_model 4096 errs by more than 1e-6 of the largest logit; every backend stays well below."""
    generator = torch.Generator().manual_seed(0)
    row, targets = torch.randn(64, 8, 4096, generator=generator), torch.randn(8, 1, 4096, generator=generator)
    weight = torch.ones(4096)
    true = ops.answer_logits(row.double(), None, weight.double(), None, 1e-6, "rms", targets.double())
    for backend in ("auto", "reference"):
        found = ops.answer_logits(row, None, weight, None, 1e-6, "rms", targets, backend=backend)
        assert float((found.double() - true).abs().max() / true.abs().max()) < 6e-7, backend
