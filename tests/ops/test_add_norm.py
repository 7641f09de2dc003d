"""add_norm: reference by hand, kernel against fp64, odd and misaligned inputs, refusals."""

import pytest
import torch
from cases import NATIVE, SIZES, eager_add_norm, make, misaligned, name_of, needs_cuda, oracle_add_norm
from tolerances import assert_within_rule

from pyarith import ops
from pyarith.errors import InputError

EPS = 1e-5


def test_reference_by_hand():
    # row 1 + delta 1 + write (1, 2) = (3, 4): mean square 12.5, mean 3.5, variance 0.25
    def call(kind, weight, bias=None):
        row = torch.ones(1, 1, 2, dtype=torch.float64)
        out = ops.add_norm(
            row,
            torch.ones(1, 1, 2),
            torch.tensor([[1.0, 2.0]]),
            torch.tensor(weight),
            bias,
            0.0,
            kind,
            out_dtype=torch.float64,
            backend="reference",
        )
        assert row.flatten().tolist() == [3.0, 4.0]
        return out.flatten().tolist()

    assert call("rms", [1.0, 2.0]) == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    assert call("rms1p", [0.0, 1.0]) == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    assert call("layer", [1.0, 2.0], torch.tensor([10.0, 20.0])) == pytest.approx([10 - 1, 20 + 2])


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model", (*SIZES, 768))
@pytest.mark.parametrize("out_dtype", NATIVE, ids=name_of)
@pytest.mark.parametrize("delta_dtype", (*NATIVE, torch.float16, None), ids=name_of)
def test_kernel_against_fp64(kind, d_model, out_dtype, delta_dtype):
    row, weight = make(3, 5, d_model), make(d_model, dtype=out_dtype, seed=1)
    delta = None if delta_dtype is None else make(3, 5, d_model, dtype=delta_dtype, seed=2)
    write = None if d_model == 3 else make(5, d_model, seed=3)
    bias = make(d_model, dtype=out_dtype, seed=4) if kind == "layer" and d_model != 17 else None
    oracle_row, oracle_out = oracle_add_norm(row, delta, write, weight, bias, EPS, kind)
    eager = eager_add_norm(row, delta, write, weight, bias, EPS, kind, out_dtype)
    by_reference = row.clone()
    ops.add_norm(by_reference, delta, write, weight, bias, EPS, kind, backend="reference")

    for place in (torch.Tensor.clone, misaligned):
        moved = place(row)
        out = place(torch.full_like(row, torch.nan, dtype=out_dtype))
        result = ops.add_norm(
            moved,
            None if delta is None else place(delta),
            None if write is None else place(write),
            place(weight),
            None if bias is None else place(bias),
            EPS,
            kind,
            out=out,
            backend="cpu",
        )
        assert result is out
        assert torch.equal(moved, by_reference), "row: kernel and reference add in the same order"
        assert_within_rule(moved, by_reference, oracle_row, "row")
        assert_within_rule(out, eager, oracle_out, "out")


def test_layer_norm_does_not_cancel():
    # mean 1000, deviation 1: E[x^2] - E[x]^2 in fp32 would lose five digits
    row = make(2, 2, 768) + 1000
    weight = torch.ones(768)
    oracle = oracle_add_norm(row, None, None, weight, None, EPS, "layer")[1]
    eager = eager_add_norm(row, None, None, weight, None, EPS, "layer", torch.float32)
    assert_within_rule(ops.add_norm(row, None, None, weight, None, EPS, "layer", backend="cpu"), eager, oracle)


def test_other_strides_are_right():
    row, weight = make(3, 4, 17), make(34)[::2]
    delta, write = make(3, 17, 4).transpose(1, 2), make(17, 4).T
    expected_row, expected = oracle_add_norm(row, delta, write, weight, None, EPS, "rms")
    eager = eager_add_norm(row, delta, write, weight, None, EPS, "rms", torch.float32)
    out = ops.add_norm(row, delta, write, weight, None, EPS, "rms", backend="cpu")
    assert_within_rule(out, eager, expected)
    assert_within_rule(row, row, expected_row)


@pytest.mark.parametrize("shape", ((0, 4, 5), (4, 0, 5), (4, 5, 0)), ids=str)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_empty(shape, backend):
    row = torch.empty(shape)
    out = ops.add_norm(
        row, row.clone(), torch.empty(shape[1:]), torch.empty(shape[2]), None, EPS, "rms", backend=backend
    )
    assert out.shape == shape


@pytest.mark.parametrize("row_dtype, out_dtype", ((torch.float64, torch.float64), (torch.float32, torch.float16)))
def test_steps_down_to_reference(row_dtype, out_dtype):
    row, weight = make(2, 3, 17, dtype=row_dtype), make(17, dtype=out_dtype)
    oracle = oracle_add_norm(row, None, None, weight, None, EPS, "rms")[1]
    assert ops.backend_of("add_norm", "cpu", out_dtype) == "reference"
    out = ops.add_norm(row, None, None, weight, None, EPS, "rms")
    assert out.dtype is out_dtype
    assert_within_rule(out, oracle.to(out_dtype), oracle)


def test_nan_and_inf_stay_in_their_row():
    row = make(1, 3, 17)
    row[0, 0, 3], row[0, 1, 16] = torch.nan, torch.inf
    out = ops.add_norm(row, None, None, torch.ones(17), None, EPS, "layer", out_dtype=torch.bfloat16, backend="cpu")
    assert out[0, 0].isnan().all() and out[0, 1].isnan().any() and out[0, 2].isfinite().all()


@needs_cuda
@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model", (*SIZES, 264, 768, 4096, 8192, 16384, 20000))
@pytest.mark.parametrize("dtype", (*NATIVE, torch.float16), ids=name_of)
@pytest.mark.parametrize("place", (torch.Tensor.cuda, lambda t: misaligned(t.cuda())), ids=("aligned", "misaligned"))
def test_cuda_kernel_against_fp64(kind, d_model, dtype, place):
    # 264 .. 16384 take the paths that keep a row in registers, odd sizes and 20000 the one that reads it twice
    row, delta, write = make(3, 5, d_model), make(3, 5, d_model, dtype=dtype, seed=2), make(5, d_model, seed=3)
    weight, bias = make(d_model, dtype=dtype, seed=1), make(d_model, dtype=dtype, seed=4) if kind == "layer" else None
    delta, write = (None if d_model == 3 else delta), (None if d_model == 17 else write)
    oracle_row, oracle_out = oracle_add_norm(row, delta, write, weight, bias, EPS, kind)
    eager = eager_add_norm(row, delta, write, weight, bias, EPS, kind, dtype)
    eager_row = row.clone()
    ops.add_norm(eager_row, delta, write, weight, bias, EPS, kind, backend="reference")
    results = []
    for _ in range(3):
        moved = [None if t is None else place(t) for t in (row, delta, write, weight, bias)]
        out = place(torch.full_like(row, torch.nan, dtype=dtype))
        assert ops.add_norm(*moved, EPS, kind, out=out, backend="cuda") is out
        results.append((out.cpu(), moved[0].cpu()))
    assert_within_rule(results[0][0], eager, oracle_out, "out")
    assert_within_rule(results[0][1], eager_row, oracle_row, "row")
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def arguments(**changed):
    known = dict(row=make(2, 3, 17), delta=None, write=None, weight=make(17), bias=None, eps=EPS, kind="rms")
    return known | changed


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(row=make(3, 17)), "row: expected [variant, batch, d_model], got shape (3, 17)"),
        (dict(row=make(2, 3, 17, dtype=torch.bfloat16)), "row: expected dtype float32, float64; got bfloat16"),
        (dict(row=make(3, 2, 17).transpose(0, 1)), "row: expected a contiguous tensor"),
        (dict(delta=make(2, 3, 16)), "delta: expected shape [variant, batch, d_model] = (2, 3, 17), got (2, 3, 16)"),
        (dict(write=make(2, 17)), "write: expected shape [batch, d_model] = (3, 17), got (2, 17)"),
        (dict(weight=make(16)), "weight: expected shape [d_model] = (17,), got (16,)"),
        (
            dict(weight=torch.ones(17, dtype=torch.int64)),
            "weight: expected dtype bfloat16, float16, float32, float64; got int64",
        ),
        (dict(weight=torch.ones(17, device="meta")), "weight: expected device cpu"),
        (dict(bias=make(17)), "bias: only kind 'layer' has one"),
        (dict(kind="batch"), "kind: expected one of rms, rms1p, layer; got 'batch'"),
        (dict(out=torch.empty(2, 3, 16)), "out: expected shape"),
        (dict(out=torch.empty(3, 2, 17).transpose(0, 1)), "out: expected a contiguous tensor"),
        (dict(out=torch.empty(2, 3, 17), out_dtype=torch.bfloat16), "out: expected dtype torch.bfloat16 (out_dtype)"),
        (dict(weight=make(17).requires_grad_()), "add_norm has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_refusals_name_the_argument(changed, words, backend):
    with pytest.raises(InputError) as caught:
        ops.add_norm(**arguments(**changed), backend=backend)
    assert words in str(caught.value)
