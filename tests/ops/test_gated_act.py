"""gated_act: reference by hand, kernel against fp64 over the whole range, strided rows, in place, refusals."""

import math

import pytest
import torch
from cases import NATIVE, SIZES, eager_gated_act, make, misaligned, name_of, needs_cuda, oracle_gated_act
from tolerances import assert_within_rule

from pyarith import ops
from pyarith.errors import InputError


def test_reference_by_hand():
    gate, up = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    sigmoid = 1 / (1 + math.exp(-1))
    normal = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    curve = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))
    for act, value in (("silu", sigmoid), ("gelu", normal), ("gelu_tanh", curve), ("relu", 1.0)):
        out = ops.gated_act(gate, up, act, backend="reference")
        assert out.flatten().tolist() == pytest.approx([2 * value, -3 * (1 - value)]), act


@pytest.mark.parametrize("act", ops.ACTS)
@pytest.mark.parametrize("d_mlp", (*SIZES, 640))
@pytest.mark.parametrize("dtype", NATIVE, ids=name_of)
@pytest.mark.parametrize("gated", (True, False), ids=("gated", "plain"))
def test_kernel_against_fp64(act, d_mlp, dtype, gated):
    gate = make(7, d_mlp, dtype=dtype) * 3
    up = make(7, d_mlp, dtype=dtype, seed=1) if gated else None
    oracle, eager = oracle_gated_act(gate, up, act), eager_gated_act(gate, up, act)
    for place in (torch.Tensor.clone, misaligned):
        out = place(torch.full_like(gate, torch.nan))
        assert ops.gated_act(place(gate), None if up is None else place(up), act, out=out, backend="cpu") is out
        assert_within_rule(out, eager, oracle)


@pytest.mark.parametrize("act", ops.ACTS)
def test_every_value_within_ulps(act):
    # elementwise, so that a wrong branch far out cannot hide behind the largest value
    gate = torch.cat(
        [torch.linspace(-20, 20, 40001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([-500.0, 500.0])]
    )[None]
    wide = gate.double()
    if act == "gelu":  # 1 + erf(x) cancels in fp64, too
        oracle = 0.5 * wide * torch.special.erfc(-wide / math.sqrt(2))
    elif act == "gelu_tanh":
        oracle = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    else:
        oracle = oracle_gated_act(gate, None, act)
    got = ops.gated_act(gate, None, act, backend="cpu").double()
    # Relative to each value: the exponent's own rounding grows with its size. Below e^-88 only the size is kept.
    allowed = oracle.abs() * 2.0**-20 * (1 + wide.abs()) + 1e-35
    worst = ((got - oracle).abs() / allowed).argmax()
    assert ((got - oracle).abs() <= allowed).all(), (
        gate[0, worst].item(),
        got[0, worst].item(),
        oracle[0, worst].item(),
    )


def test_halves_of_a_fused_projection():
    fused = make(2, 5, 2 * 17)
    gate, up = fused.chunk(2, -1)
    expected = oracle_gated_act(gate, up, "silu")
    eager = eager_gated_act(gate, up, "silu")
    assert_within_rule(ops.gated_act(gate, up, "silu", backend="cpu"), eager, expected)
    keep = up.clone()
    result = ops.gated_act(gate, up, "silu", out=gate, backend="cpu")
    assert result is gate and torch.equal(up, keep)
    assert_within_rule(gate, eager, expected)


@pytest.mark.parametrize("dtype", NATIVE, ids=name_of)
def test_in_place_is_bitwise_the_same(dtype):
    gate, up = make(9, 127, dtype=dtype), make(9, 127, dtype=dtype, seed=1)
    expected = ops.gated_act(gate, up, "gelu", backend="cpu")
    assert torch.equal(ops.gated_act(gate.clone(), up, "gelu", out=gate, backend="cpu"), expected)
    gate = make(9, 127, dtype=dtype)
    assert torch.equal(ops.gated_act(gate, up, "gelu", out=gate, backend="cpu"), expected)
    gate = make(9, 127, dtype=dtype)
    assert torch.equal(ops.gated_act(gate, up, "gelu", out=up, backend="cpu"), expected)


def test_other_strides_are_right():
    gate, up = make(17, 6).T, make(3, 2, 17).transpose(0, 1).reshape(6, 17)
    every = make(4, 3, 17)[::2]
    for g, u in ((gate, up), (every, every.transpose(0, 1).contiguous().transpose(0, 1))):
        assert_within_rule(
            ops.gated_act(g, u, "silu", backend="cpu"), eager_gated_act(g, u, "silu"), oracle_gated_act(g, u, "silu")
        )


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (2, 0, 3)), ids=str)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_empty(shape, backend):
    assert ops.gated_act(torch.empty(shape), torch.empty(shape), backend=backend).shape == shape


def test_special_values():
    values = torch.tensor([[math.nan, math.inf, 0.0, -0.0, 1e-42, -1e-42]])
    for act in ops.ACTS:
        for dtype in NATIVE:
            got = ops.gated_act(values.to(dtype), None, act, backend="cpu")[0]
            assert got[0].isnan() and got[1] == math.inf and (got[2:].abs() <= 1e-42).all(), (act, dtype)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=name_of)
def test_steps_down_to_reference(dtype):
    gate = make(3, 17, dtype=dtype)
    assert ops.backend_of("gated_act", "cpu", dtype) == "reference"
    oracle = oracle_gated_act(gate, gate, "silu")
    assert_within_rule(ops.gated_act(gate, gate, "silu"), eager_gated_act(gate, gate, "silu"), oracle)


@needs_cuda
@pytest.mark.parametrize("act", ops.ACTS)
@pytest.mark.parametrize("rows, d_mlp", ((7, 1), (7, 3), (7, 127), (8, 127), (7, 640), (33, 11008)))
@pytest.mark.parametrize("dtype", (*NATIVE, torch.float16), ids=name_of)
@pytest.mark.parametrize("place", (torch.Tensor.cuda, lambda t: misaligned(t.cuda())), ids=("aligned", "misaligned"))
def test_cuda_kernel_against_fp64(act, rows, d_mlp, dtype, place):
    gate, other = make(rows, d_mlp, dtype=dtype) * 3, make(rows, d_mlp, dtype=dtype, seed=1)
    for up in (other, None):
        oracle, eager = oracle_gated_act(gate, up, act), eager_gated_act(gate, up, act)
        first, second = place(gate), None if up is None else place(up)
        out = place(torch.full_like(gate, torch.nan))
        assert ops.gated_act(first, second, act, out=out, backend="cuda") is out
        assert_within_rule(out.cpu(), eager, oracle)
        assert all(torch.equal(ops.gated_act(first, second, act, backend="cuda"), out) for _ in range(3))
        if up is not None:
            assert torch.equal(ops.gated_act(first, second, act, out=second, backend="cuda"), out)
            second = place(up)
        assert torch.equal(ops.gated_act(first, second, act, out=first, backend="cuda"), out)


@needs_cuda
@pytest.mark.parametrize("d_mlp", (24, 17))
def test_cuda_halves_of_a_fused_projection(d_mlp):
    fused = make(2, 5, 2 * d_mlp)
    gate, up = fused.chunk(2, -1)
    expected, eager = oracle_gated_act(gate, up, "silu"), eager_gated_act(gate, up, "silu")
    first, second = fused.cuda().chunk(2, -1)
    assert ops.gated_act(first, second, "silu", out=first, backend="cuda") is first
    assert_within_rule(first.cpu(), eager, expected)
    assert torch.equal(second.cpu(), up)


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(gate=make(17)), "gate: expected at least two dimensions"),
        (dict(gate=torch.ones(2, 17, dtype=torch.int32)), "gate: expected dtype"),
        (dict(up=make(2, 16)), "up: expected shape that of gate = (2, 17), got (2, 16)"),
        (dict(up=make(2, 17, dtype=torch.bfloat16)), "up: expected dtype float32; got bfloat16"),
        (dict(act="swish"), "act: expected one of silu, gelu, gelu_tanh, relu; got 'swish'"),
        (dict(out=make(2, 18)), "out: expected shape"),
        (dict(out=make(17, 2).T), "out: expected rows at one distance"),
        (dict(gate=make(2, 17).requires_grad_()), "gated_act has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    with pytest.raises(InputError) as caught:
        ops.gated_act(**(dict(gate=make(2, 17), up=None, act="silu") | changed), backend="cpu")
    assert words in str(caught.value)
