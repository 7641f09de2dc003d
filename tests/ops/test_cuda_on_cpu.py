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
from cases import eager_add_norm, make, name_of, oracle_add_norm, samples
from cuda_on_cpu.build import HERE, ORDERS, build_kernels, build_module
from tolerances import assert_within_rule
from toolchain import CUDA_SOURCES

from pyarith import ops
from pyarith.ops import _native

EPS = 1e-5
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
CANARY = 64  # bytes of NaN on both sides of each buffer; keeps its alignment


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


class Buffer:
    """A copy of a tensor between canaries; ``shift`` elements off its alignment, rows ``gap`` elements apart."""

    def __init__(self, tensor: torch.Tensor, shift: int = 0, gap: int = 0):
        width = tensor.shape[-1] + gap
        count = tensor.numel() // max(tensor.shape[-1], 1) * width
        self.bytes = torch.full((2 * CANARY + (count + shift) * tensor.itemsize,), 0xFF, dtype=torch.uint8)
        inner = self.bytes[CANARY + shift * tensor.itemsize : len(self.bytes) - CANARY].view(tensor.dtype)
        self.tensor = inner.view(*tensor.shape[:-1], width)[..., : tensor.shape[-1]]
        self.untouched = torch.ones_like(self.bytes, dtype=torch.bool)
        mask = self.untouched[CANARY + shift * tensor.itemsize : len(self.bytes) - CANARY]
        mask.view(*tensor.shape[:-1], width * tensor.itemsize)[..., : tensor.shape[-1] * tensor.itemsize] = False
        self.tensor.copy_(tensor)

    def assert_surroundings(self, name):
        assert (self.bytes[self.untouched] == 0xFF).all(), f"{name}: written outside of the tensor"


def run(built, kernel, arguments, written, *, shift=0, gaps=None, **scalars):
    """Call ``kernel`` once per order of threads and blocks on guarded copies; what it wrote, the same every time.

    Args:
        arguments: tensors by name in the kernel's order.
        written: name -> "w" (starts as NaN) or "rw"; all others may only be read.
        gaps: name -> distance between rows beyond their length.
    """
    module, emulator = built
    results = []
    for order in ORDERS:
        buffers = {}
        for name, tensor in arguments.items():
            if tensor is not None:
                fill = torch.full_like(tensor, torch.nan) if written.get(name) == "w" else tensor
                buffers[name] = Buffer(fill, shift, (gaps or {}).get(name, 0))
        tensors = [buffers[name].tensor if name in buffers else None for name in arguments]
        allowed = [(buffer.tensor, written.get(name, "r")) for name, buffer in buffers.items()]
        with emulator.order(*order), emulator.only(*allowed):
            getattr(module, kernel)(*tensors, **scalars, stream=0)
        for name, buffer in buffers.items():
            buffer.assert_surroundings(name)
        results.append({name: buffers[name].tensor for name in written})
    for result in results[1:]:
        for name in written:
            same = torch.equal(result[name].view(torch.uint8), results[0][name].view(torch.uint8))
            assert same, f"{name} depends on the order of threads or blocks"
    return results[0]


# 8 .. 16384: a row in registers, in 1, 2 or 4 vectors a thread; 20000 and odd sizes: read twice
@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("d_model", (1, 3, 8, 17, 127, 264, 768, 4104, 8192, 8200, 16384, 20000))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shift", (0, 1), ids=("aligned", "misaligned"))
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


KERNELS = {path.stem for path in CUDA_SOURCES}
SAMPLES = [(op, i) for op, calls in samples().items() if op in KERNELS for i in range(len(calls))]


def test_every_kernel_is_sampled():
    assert {op for op, _ in SAMPLES} == KERNELS


@pytest.mark.parametrize("op, i", SAMPLES)
def test_wrapper_hands_its_arguments_over(wrapped, op, i):
    reference = importlib.import_module(f"pyarith.ops.{op}").reference
    args = samples()[op][i]
    native, plain = ([a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(2))
    wrapped(op)(*native)
    reference(*plain)
    for got, expected in zip(native, plain, strict=True):
        if isinstance(got, torch.Tensor) and got.is_floating_point():
            assert_within_rule(got, expected, expected.double())


def test_add_norm_wrapper_upcasts(wrapped):
    row, out = make(3, 2, 24), torch.full((3, 2, 24), torch.nan)
    delta, write = make(3, 24, 2, dtype=torch.float64).transpose(1, 2), make(24, 2, dtype=F16).T
    weight, bias = make(48, dtype=torch.float64)[::2], make(24, dtype=torch.float64, seed=1)
    plain = (row.clone(), delta, write, weight, bias, EPS, "layer")
    wrapped("add_norm")(row, delta, write, weight, bias, out, EPS, "layer")
    assert_within_rule(out, eager_add_norm(*plain, F32), oracle_add_norm(*plain)[1])


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
