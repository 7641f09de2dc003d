"""slice_grad: by hand, against the full gradient in fp64, ranges of every kind, accumulation, refusals."""

import re
import sys

import pytest
import torch
from cases import make, name_of
from tolerances import FLOOR, assert_within_rule, error

from pyarith import ops
from pyarith.errors import BackendError, InputError, InputTypeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
M, N = 48, 40
RANGES = {
    "all": None,
    "none": (),
    "one": ((8, 24),),
    "whole": ((0, 40),),
    "touching": ((0, 16), (16, 24)),
    "many": ((0, 5), (7, 8), (9, 24), (33, 40)),
    "many, touching": ((0, 8), (8, 16), (24, 32)),
}
WIDE = {torch.float64: torch.float64}


def kept(size, ranges):
    """The features that ranges take, one by one."""
    ranges = ((0, size),) if ranges is None else ranges
    return torch.tensor([i for start, stop in ranges for i in range(start, stop)], dtype=torch.int64)


def chosen(full, left_ranges, right_ranges):
    """What the op should leave of the full gradient."""
    return full[kept(full.shape[0], left_ranges)][:, kept(full.shape[1], right_ranges)]


def empty_for(left, right, left_ranges=None, right_ranges=None, value=torch.nan):
    shape = chosen(torch.empty(left.shape[1], right.shape[1]), left_ranges, right_ranges).shape
    return torch.full(shape, value, dtype=WIDE.get(left.dtype, torch.float32))


def test_by_hand():
    # two tokens: the gradient is (1, 2, 3) x (1, 10) + (4, 5, 6) x (2, 0)
    left, right = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1.0, 10.0], [2.0, 0.0]])
    out = torch.full((2, 2), 7.0)
    assert ops.slice_grad(left, right, out, ((0, 1), (2, 3))) is out
    assert out.tolist() == [[9.0, 10.0], [15.0, 30.0]]
    ops.slice_grad(left, right, out, ((0, 1), (2, 3)), accumulate=True)
    assert out.tolist() == [[18.0, 20.0], [30.0, 60.0]]
    column = torch.empty(3, 1)
    assert ops.slice_grad(left, right, column, right_ranges=((1, 2),)).tolist() == [[10.0], [20.0], [30.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "left_name, right_name",
    [
        *((name, "all") for name in RANGES),
        *(("all", name) for name in RANGES if name != "all"),
        ("many", "many, touching"),
        ("one", "many"),
    ],
)
def test_against_the_full_gradient_in_fp64(left_name, right_name, dtype):
    left, right = make(70, M, dtype=dtype), make(70, N, dtype=dtype, seed=1)
    ranges = RANGES[left_name], RANGES[right_name]
    wide = WIDE.get(dtype, torch.float32)
    oracle = chosen(left.double().T @ right.double(), *ranges)
    eager = chosen(left.to(wide).T @ right.to(wide), *ranges)
    out = empty_for(left, right, *ranges)
    assert_within_rule(ops.slice_grad(left, right, out, *ranges), eager, oracle)
    out = empty_for(left, right, *ranges, value=2.5)
    assert_within_rule(ops.slice_grad(left, right, out, *ranges, accumulate=True), eager + 2.5, oracle + 2.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tokens", (0, 1, 6, 7, 8, 23))
def test_chunks_of_tokens(tokens, dtype, monkeypatch):
    module = sys.modules["pyarith.ops.slice_grad"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "_ELEMENTS", 1)
    monkeypatch.setattr(module, "_LEAST_TOKENS", 7)
    left, right, ranges = make(tokens, M, dtype=dtype), make(tokens, N, dtype=dtype), RANGES["many"]
    out = ops.slice_grad(left, right, empty_for(left, right, ranges), ranges)
    wide = WIDE.get(dtype, torch.float32)
    oracle = chosen(left.double().T @ right.double(), ranges, None)
    assert_within_rule(out, chosen(left.to(wide).T @ right.to(wide), ranges, None), oracle)
    before = out.clone()
    ops.slice_grad(left, right, out, ranges, accumulate=True)
    assert error(out, 2 * before) <= FLOOR[wide]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_strided_inputs_and_results(dtype):
    left, right, ranges = make(30, M, dtype=dtype), make(30, N, dtype=dtype), (RANGES["many"], RANGES["one"])
    expected = ops.slice_grad(left, right, empty_for(left, right, *ranges), *ranges)
    fused = torch.cat([left, right], 1)  # as a fused projection leaves them: rows lie apart
    views = fused[:, :M], fused[:, M:]
    wide = torch.full((expected.shape[0], expected.shape[1] + 9), torch.nan)
    out = ops.slice_grad(*views, wide[:, 3:-6], *ranges)
    assert error(out, expected) <= FLOOR[torch.float32]
    assert wide[:, :3].isnan().all() and wide[:, -6:].isnan().all(), "wrote outside of its result"
    # the gradient of a sum is one number with strides 0; that of a transposition has no stride 1 along the features
    flat = torch.ones((), dtype=dtype).expand(30, M)
    same = ops.slice_grad(flat, right, empty_for(left, right, *ranges), *ranges)
    assert torch.equal(same, ops.slice_grad(flat.contiguous(), right, torch.empty_like(same), *ranges))
    turned = left.T.contiguous().T
    assert error(ops.slice_grad(turned, right, torch.empty_like(same), *ranges), expected) <= FLOOR[torch.float32]


def test_what_was_accumulated_in_fp32_is_not_rounded_to_the_inputs():
    # 256 + 1 is 256 in bf16
    left, right, out = torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16), torch.zeros(2, 2)
    for _ in range(300):
        ops.slice_grad(left, right, out, accumulate=True)
    assert out.tolist() == [[300.0] * 2] * 2
    out = ops.slice_grad(left.expand(600, 2), right.expand(600, 2), torch.empty(2, 2))
    assert out.tolist() == [[600.0] * 2] * 2


@pytest.mark.parametrize("transposed", (False, True), ids=("linear", "conv1d"))
def test_is_the_gradient_of_a_layer(transposed):
    weight, x, ranges = make(M, N).requires_grad_(), make(2, 15, N), RANGES["many"]
    y = x @ weight.T
    grad_y = make(*y.shape)
    y.backward(grad_y)
    left, right, sides = grad_y.view(-1, M), x.view(-1, N), (ranges, None)
    expected = chosen(weight.grad, ranges, None)
    if transposed:
        left, right, sides, expected = right, left, (None, ranges), expected.T
    assert error(ops.slice_grad(left, right, empty_for(left, right, *sides), *sides), expected) <= FLOOR[torch.float32]


class Sliced(torch.autograd.Function):
    """y = x @ weight.T with a gradient for a slice of the weight's rows only."""

    @staticmethod
    def forward(ctx, x, weight, part, ranges):
        ctx.save_for_backward(x, weight)
        ctx.ranges = ranges
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        part = torch.empty(sum(stop - start for start, stop in ctx.ranges), x.shape[1])
        return grad @ weight, None, ops.slice_grad(grad, x, part, ctx.ranges), None


def test_in_a_compiled_backward():
    x, weight, ranges = make(9, N), make(M, N), RANGES["many"]
    part = chosen(weight, ranges, None).requires_grad_()

    def loss(x, part):
        return Sliced.apply(x, weight, part, ranges).square().sum()

    loss(x, part).backward()
    expected, part.grad = part.grad, None
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True)(x, part).backward()
    assert error(part.grad, expected) <= FLOOR[torch.float32]


def test_autocast_changes_nothing():
    left, right, out = make(9, M), make(9, N), torch.empty(M, N)
    expected = ops.slice_grad(left, right, out).clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.slice_grad(left, right, out), expected)


def test_on_a_gpu_the_product_of_16_bit_factors_has_an_fp32_result():
    """The form of torch.mm that the reference uses there: traced on tensors without memory, and counted."""
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    reference = sys.modules["pyarith.ops.slice_grad"].reference
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        left = torch.empty(9, M, dtype=torch.bfloat16, device="cuda")
        reference(left, left, torch.empty(31, M, device="cuda"), [0, 15, 20, 36], None, False)
    assert "aten.mm.dtype" in seen and not [name for name in seen if "addmm" in name or "_to_copy" in name], seen


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(left=make(4, 3, 2)), "left: expected [token, m], got shape (4, 3, 2)"),
        (dict(left=torch.ones(4, 6, dtype=torch.int32)), "left: expected dtype bfloat16, float16, float32, float64"),
        (dict(right=make(5, 5)), "right: expected shape [token, n] = (4, 5), got (5, 5)"),
        (dict(right=make(4, 5, dtype=torch.bfloat16)), "right: expected dtype float32; got bfloat16"),
        (dict(right=torch.empty(4, 5, device="meta")), "right: expected device cpu (that of the first tensor)"),
        (dict(out=torch.empty(6, 5)), "out: expected shape [rows taken, columns taken] = (3, 5), got (6, 5)"),
        (dict(out=torch.empty(3, 5, dtype=torch.bfloat16)), "out: expected dtype float32; got bfloat16"),
        (dict(out=torch.empty(3, 5, dtype=torch.float64)), "out: expected dtype float32; got float64"),
        (dict(out=torch.empty(5, 3).T), "out: expected rows of consecutive elements that do not overlap, got strides"),
        (dict(out=torch.empty(5).expand(3, 5)), "out: expected rows of consecutive elements that do not overlap"),
        (dict(left_ranges=((0, 2), (1, 3))), "within 0 ... 6; got (1, 3) after one that ends at 2"),
        (dict(left_ranges=((3, 4), (0, 2))), "left_ranges: expected sorted (start, stop) pairs with start < stop"),
        (dict(left_ranges=((4, 7),)), "within 0 ... 6; got (4, 7)"),
        (dict(left_ranges=((-1, 2),)), "within 0 ... 6; got (-1, 2)"),
        (dict(left_ranges=((2, 2),)), "within 0 ... 6; got (2, 2)"),
        (dict(right_ranges=((0, 6),)), "right_ranges: expected sorted (start, stop) pairs"),
        (dict(left=make(4, 6).requires_grad_()), "slice_grad has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    known = dict(left=make(4, 6), right=make(4, 5), out=torch.full((3, 5), 3.0), left_ranges=((1, 4),))
    given = known | changed
    before = given["out"].clone()
    with pytest.raises(InputError, match=re.escape(words)):
        ops.slice_grad(**given)
    assert torch.equal(given["out"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("ranges", ((1, 4), ((1, 2, 3),), ((1.0, 4.0),), (torch.arange(2),)), ids=str)
def test_ranges_are_pairs_of_integers(ranges):
    with pytest.raises(InputTypeError, match=r"left_ranges: expected \(start, stop\) pairs of integers"):
        ops.slice_grad(make(4, 6), make(4, 5), torch.empty(3, 5), ranges)


def test_the_torch_entry_wants_whole_pairs():
    with pytest.raises(InputError, match="right_ranges: expected a start and a stop of each range, got 3 numbers"):
        torch.ops.pyarith.slice_grad(make(4, 6), make(4, 5), torch.empty(6, 1), None, [0, 1, 2], False)


def test_triton_by_name_says_why_not_on_a_cpu():
    with pytest.raises(BackendError, match="slice_grad: backend 'triton' cannot run on cpu"):
        ops.slice_grad(make(4, 6), make(4, 5), torch.empty(6, 5), backend="triton")
