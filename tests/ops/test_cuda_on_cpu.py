"""The sources of the CUDA kernels, run on the CPU: numbers against fp64, memory bounds, barriers and races.

cuda_on_cpu/runtime.cpp says what is checked. What stays open without a device: what nvcc and the GPU make of the same
sources (contraction to FMA, the device's own exp and rsqrt, memory order within a warp), and speed.
"""

from __future__ import annotations

import ctypes
import importlib
import re

import pytest
import torch
from adamw_cases import SMALL, problem
from cases import (
    adamw_sample,
    eager_add_norm,
    eager_gated_act,
    make,
    mapped,
    name_of,
    oracle_add_norm,
    oracle_gated_act,
    plain_answer_logits,
    samples,
    tensors_in,
)
from cuda_on_cpu.build import HERE, ORDERS, build_kernels, build_module
from cuda_on_cpu.guarded import Buffer, run
from single_thread import one_thread  # noqa: F401
from tolerances import assert_within_rule
from toolchain import CUDA_SOURCES

from pyarith import ops
from pyarith.ops import _native

pytestmark = pytest.mark.timeout(400)  # the first test waits for the compilers, on a machine that may be busy
EPS = 1e-5
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
# (d_model, elements off the alignment). In registers, in 1, 2 or 4 vectors a thread, with and without idle threads:
ROWS = [(d, 0) for d in (8, 264, 768, 1032, 4104, 8200, 16384)]
# and element by element.
ROWS += [(d, 0) for d in (1, 3, 17, 127, 20000)] + [(d, 1) for d in (1, 3, 8, 264, 1032, 4104)]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return build_module(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def wrapped(built, monkeypatch):
    """The ops' own `_cuda` functions on CPU tensors: the launch without a device and a stream."""
    module, _ = built
    monkeypatch.setattr(_native, "C", module)
    monkeypatch.setattr(
        _native, "launch", lambda kernel, *tensors, **scalars: getattr(module, kernel)(*tensors, **scalars, stream=0)
    )
    return lambda op: importlib.import_module(f"pyarith.ops.{op}")._cuda


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model, shift", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_add_norm(built, kind, d_model, dtype, shift):
    variants, batch = (3, 5) if d_model < 1000 else (2, 2)
    other = DTYPES[(DTYPES.index(dtype) + 1) % 3]  # no two of the three dtypes are the same
    row, delta = make(variants, batch, d_model), make(variants, batch, d_model, dtype=other, seed=2)
    write, weight = make(batch, d_model, seed=3), make(d_model, dtype=dtype, seed=1)
    bias = make(d_model, dtype=other, seed=4) if kind == "layer" and d_model != 17 else None
    if d_model in (3, 264):
        delta = None
    if d_model in (8, 127, 264):
        write = None
    plain = (row, delta, write, weight, bias, EPS, kind)
    oracle_row, oracle_out = oracle_add_norm(*plain)
    arguments = dict(row=row, delta=delta, write=write, weight=weight, bias=bias, out=row.to(dtype))
    got = run(built, "add_norm_cuda", arguments, dict(row="rw", out="w"), shift=shift, eps=EPS, kind=kind)
    expected_row = row.clone()
    ops.add_norm(expected_row, *plain[1:], backend="reference")
    assert torch.equal(got["row"], expected_row), "row: kernel and reference add in the same order"
    assert_within_rule(got["row"], expected_row, oracle_row, "row")
    assert_within_rule(got["out"], eager_add_norm(*plain, dtype), oracle_out, "out")


# Distances between the rows of gate, up and out beyond their length: aligned ones, and each alone off the alignment.
GAPS = ((0, 0, 0), (8, 16, 24), (1, 0, 0), (0, 1, 0), (0, 0, 1))
GATED_SHIFTS = [(act, shift) for act in ops.ACTS for shift in (0, 1)]
GATED_SHIFTS += [("silu", {name: 1}) for name in ("gate", "up", "out")]


@pytest.mark.parametrize("act, shift", GATED_SHIFTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows, d_mlp", ((1, 1), (3, 17), (5, 24), (8, 33), (2, 4104)))
def test_gated_act(built, act, dtype, rows, d_mlp, shift):
    gate, up = make(rows, d_mlp, dtype=dtype) * 3, make(rows, d_mlp, dtype=dtype, seed=1)
    if d_mlp == 33:
        up = None
    oracle, eager = oracle_gated_act(gate, up, act), eager_gated_act(gate, up, act)
    first = None
    for distances in GAPS if act == "silu" else GAPS[:2]:
        more = dict(shift=shift, gaps=dict(zip(("gate", "up", "out"), distances, strict=True)), act=act)
        out = run(built, "gated_act_cuda", dict(gate=gate, up=up, out=gate), dict(out="w"), **more)["out"]
        first = out if first is None else first
        assert_within_rule(out, eager, oracle)
        assert torch.equal(out, first), distances
        for target in ("gate", "up") if up is not None else ("gate",):
            got = run(built, "gated_act_cuda", dict(gate=gate, up=up, out=target), {target: "rw"}, **more)[target]
            assert torch.equal(got, out), target


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model, shift", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_answer_logits(built, kind, d_model, dtype, shift):
    variants, batch, k = (3, 5, 3) if d_model < 1000 else (2, 2, 2)
    other = DTYPES[(DTYPES.index(dtype) + 1) % 3]
    row, weight = make(variants, batch, d_model), make(d_model, dtype=dtype, seed=1)
    write = None if d_model in (3, 264) else make(batch, d_model, seed=3)
    bias = make(d_model, dtype=dtype, seed=4) if kind == "layer" and d_model != 17 else None
    targets = make(batch, k, d_model, dtype=other, seed=2)
    target_bias = None if d_model in (8, 127) else make(batch, k, seed=5)
    scale, softcap = (0.25, 30.0) if d_model in (17, 768) else (1.0, 0.0)
    plain = (row, write, weight, bias, EPS, kind, targets, target_bias, scale, softcap)
    arguments = dict(row=row, write=write, weight=weight, bias=bias, target_rows=targets, target_bias=target_bias)
    got = run(
        built,
        "answer_logits_cuda",
        arguments | dict(out=torch.empty(variants, batch, k)),
        dict(out="w"),
        shift=shift,
        eps=EPS,
        kind=kind,
        scale=scale,
        softcap=softcap,
    )["out"]
    assert_within_rule(got, plain_answer_logits(F32, *plain), plain_answer_logits(torch.float64, *plain))


@pytest.mark.parametrize("name", ("row", "delta", "write", "weight", "bias", "out", "target_rows"))
def test_one_tensor_off_its_alignment(built, name):
    for dtype in DTYPES:
        if name != "target_rows":
            test_add_norm(built, "layer", 1032, dtype, {name: 1})
        if name != "delta":
            test_answer_logits(built, "layer", 1032, dtype, {name: 1})


BASELINES = ("none", "one", "batch", "pos", "all", "strided", "z_odd", "baseline_odd")
ABLATE_SHIFTS = [(baseline, shift) for baseline in BASELINES for shift in (0, 1)]
ABLATE_SHIFTS += [("all", {name: 1}) for name in ("z", "baseline", "out")]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads, d_head", ((1, 1), (5, 3), (3, 8), (33, 80)))  # the last: more than a block's one step
@pytest.mark.parametrize("baseline, shift", ABLATE_SHIFTS, ids=str)
def test_ablate_heads(built, dtype, heads, d_head, baseline, shift):
    variants, batch, pos, width = 3, 2, 5, heads * d_head
    z = make(variants, batch, pos, width, dtype=dtype)
    ablate = make(variants, heads, seed=1) > 0
    ablate[0], ablate[1] = False, True
    sizes = dict(one=(1, 1), batch=(batch, 1), pos=(1, pos)).get(baseline, (batch, pos))
    base = None if baseline == "none" else make(*sizes, width, dtype=dtype, seed=2)
    gaps = dict(strided=dict(z=16, baseline=24), z_odd=dict(z=1), baseline_odd=dict(baseline=1)).get(baseline, {})

    def by_head(tensor):
        return tensor.unflatten(-1, (heads, d_head))

    def expected(z):
        chosen = torch.zeros((), dtype=dtype) if base is None else by_head(base)
        return torch.where(ablate[:, None, None, :, None], chosen, by_head(z)).flatten(-2)

    views = dict(z=by_head) | (dict(baseline=by_head) if base is not None else {})
    more = dict(shift=shift, gaps=gaps)
    arguments = dict(z=z, ablate=ablate, baseline=base, out=z)
    got = run(built, "ablate_heads_cuda", arguments, dict(out="w"), views=views | dict(out=by_head), **more)["out"]
    assert torch.equal(got, expected(z))
    # One z for all variants, and in place.
    shared = views | dict(out=by_head, z=lambda t: by_head(t).expand(variants, -1, -1, -1, -1))
    got = run(built, "ablate_heads_cuda", arguments | dict(z=z[:1]), dict(out="w"), views=shared, **more)["out"]
    assert torch.equal(got, expected(z[:1].expand(variants, -1, -1, -1)))
    if not gaps:
        got = run(built, "ablate_heads_cuda", arguments | dict(out="z"), dict(z="rw"), views=views, **more)["z"]
        assert torch.equal(got, expected(z))


ADAMW = ("params", "grads", "exp_avgs", "exp_avg_sqs", "weights", "bounds", "counts", "dims", "grad_scale")
# more ranges than one launch takes, of more slices than one launch takes; and more than one block, rows that are a part
MANY = [((2, 480), 1, tuple((i, i + 1) for i in range(0, 230, 2))), *SMALL, *SMALL]
MANY += [((20, 1200), 1, ((0, 512), (560, 1160))), ((30, 200), 0, ((1, 30),))]
ADAMW_SHIFTS = (0, 1, *({name: 1} for name in (*ADAMW[:5], "grad_scale")))


@pytest.mark.parametrize("shift", ADAMW_SHIFTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("seed", (None, 2**33 + 7), ids=("nearest", "stochastic"))
def test_masked_adamw(built, dtype, seed, shift):
    if seed is not None and dtype is not BF16:
        pytest.skip("only bf16 is rounded stochastically")
    scale = {} if dtype is F16 else {"grad_scale": torch.tensor([0.3])}
    beta1 = 0.3 if dtype is F32 else 0.9  # below 1/2 the first moment is computed from its other end
    given = problem(dtype, MANY if shift in (0, 1) else SMALL, seed=seed, beta1=beta1, **scale)
    listed, named = importlib.import_module("pyarith.ops.masked_adamw")._prepared(*given.entry_arguments(3))
    # the weights are never read; what is not written in them stays NaN
    written = dict(params="rw", exp_avgs="rw", exp_avg_sqs="rw", weights="w")
    arguments = dict(zip(ADAMW, listed, strict=True))
    got = run(built, "masked_adamw_cuda", arguments, written, shift=shift, **named)
    for weight in given.weights:
        weight.fill_(torch.nan)
    given.step(3, "reference")
    for (name, tensor), expected in zip(got.items(), given.changed(), strict=True):
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected.view(torch.uint8)), name


def calls():
    """Arguments of the ops' `_cuda`: the samples, and dtypes and strides that the kernels do not read."""
    fused, turned = make(2, 3, 5, 4 * 8 + 16), make(3, 5, 8, 4).transpose(-1, -2)
    f64, weight = torch.float64, make(48, dtype=torch.float64)[::2]
    delta, write = make(3, 24, 2, dtype=f64).transpose(1, 2), make(24, 2, dtype=F16).T
    targets, target_bias = make(24, 5, 2, dtype=f64).permute(2, 1, 0), make(5, 2, dtype=BF16).T
    more = {
        "add_norm": (make(3, 2, 24), delta, write, weight, make(24, dtype=f64), make(3, 2, 24), EPS, "layer"),
        "answer_logits": (
            make(2, 3, 24).transpose(0, 1),
            *(write, weight, make(24, dtype=f64), targets, target_bias, torch.empty(3, 2, 5), EPS, "layer", 0.5, 9.0),
        ),
        "gated_act": (make(3, 2, 24).transpose(0, 1), make(2, 24, 3).transpose(1, 2), torch.empty(2, 3, 24), "silu"),
        "masked_adamw": adamw_sample(F16, torch.tensor(0.5), None),
        "ablate_heads": (
            fused[..., :32].unflatten(-1, (4, 8)),
            *(make(4, 2).T > 0, turned, torch.empty(2, 3, 5, 4, 8)),
        ),
    }
    known = {op: [*given, more[op]] for op, given in samples().items() if op in more}
    assert set(known) == {path.stem for path in CUDA_SOURCES}, "a kernel that no call reaches"
    return known


@pytest.mark.parametrize("op, i", [(op, i) for op, given in calls().items() for i in range(len(given))])
def test_wrapper_hands_its_arguments_over(wrapped, op, i):
    def copied(args):  # copies of what is written; contiguous ones only, so that strides stay
        return mapped(args, lambda a: a.clone() if a.is_contiguous() else a)

    native, plain = copied(calls()[op][i]), copied(calls()[op][i])
    wrapped(op)(*native)
    importlib.import_module(f"pyarith.ops.{op}").reference(*plain)
    for got, expected in zip(tensors_in(native), tensors_in(plain), strict=True):
        if got.is_floating_point():
            assert_within_rule(got, expected, expected.double())


FOUND = {
    "sound": None,
    "barrier_missing": "no thread has written|race in shared memory",
    "barrier_missing_before_reuse": "race in shared memory",
    "barrier_in_a_branch": "not all threads get there",
    "barriers_of_two_branches": "not all threads get there",
    "shuffle_in_a_branch": "not all threads get there",
    "shuffle_with_half_a_mask": "its mask leaves out",
    "write_behind_the_end": "write of 4 bytes at .*, outside of every buffer",
    "read_before_the_start": "read of 4 bytes at .*, outside of every buffer",
    "write_to_an_input": "write to a buffer that is only read",
    "blocks_share_an_element": "race in global memory",
    "block_reads_of_another": "race in global memory",
    "shared_memory_not_set": "no thread has written",
    "vector_off_its_alignment": "misaligned address",
    "index_past_an_array": "index out of bounds",
    "offset_in_32_bits": "integer overflow",
}


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    return build_kernels(tmp_path_factory.mktemp("planted"), [HERE / "planted.cu"])


def call_planted(planted, kernel, given, out, blocks):
    function = getattr(planted.library, f"run_{kernel}")
    function.restype = ctypes.c_char_p
    error = function(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), blocks)
    return None if error is None else error.decode()


@pytest.mark.parametrize("order", ORDERS, ids=("up", "threads_down", "blocks_down"))
@pytest.mark.parametrize("kernel", FOUND)
def test_planted_errors_are_found(planted, kernel, order):
    given, out = Buffer(make(2, 64)), Buffer(torch.full((2, 64), torch.nan))
    with planted.order(*order), planted.only((given.tensor, "r"), (out.tensor, "rw")):
        error = call_planted(planted, kernel, given.tensor, out.tensor, 2)
        again = call_planted(planted, "sound", given.tensor, out.tensor, 2)
    given.assert_surroundings("in")
    out.assert_surroundings("out")
    if FOUND[kernel] is None:
        assert error is None
    else:
        assert error is not None and re.search(FOUND[kernel], error), error
    assert again is None  # a launch that was ended leaves nothing behind
    expected = given.tensor.flip(1) + given.tensor.sum(1, keepdim=True)
    torch.testing.assert_close(out.tensor, expected)


def test_canaries_and_orders_find_errors_too(planted):
    """Without the list of buffers, as where a wrapper makes temporaries."""
    given, out = make(2, 64), Buffer(torch.zeros(2, 64))
    assert call_planted(planted, "write_behind_the_end", given, out.tensor, 2) is None
    with pytest.raises(AssertionError, match="written outside of the tensor"):
        out.assert_surroundings("out")
    results = []
    for order in ORDERS:
        with planted.order(*order):
            assert call_planted(planted, "blocks_share_an_element", given, out.tensor, 2) is None
        results.append(out.tensor[0, 0].item())
    assert results[0] == results[1] != results[2]
