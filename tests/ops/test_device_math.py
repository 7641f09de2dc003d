"""csrc/cuda/math.h, the arithmetic inside the CUDA kernels, compiled by g++ and compared with fp64.

The device has its own expf, erff and tanhf (1-2 ulp, as glibc's) and contracts to FMA: the last bit may differ there.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cases import oracle_gated_act
from toolchain import CSRC, CXX, compiled, missing

from pyarith import ops

SOURCE = """
#include "cuda/math.h"
using namespace pyarith;
using namespace pyarith::cuda;
#define EXPORT extern "C"
#define ELEMENTWISE(NAME, VALUE) \\
    EXPORT void NAME(const float* in, float* out, long n) { \\
        for (long i = 0; i < n; ++i) { \\
            const float x = in[i]; \\
            out[i] = VALUE; \\
        } \\
    }
ELEMENTWISE(silu_, activated<Act::silu>(x))
ELEMENTWISE(gelu_, activated<Act::gelu>(x))
ELEMENTWISE(gelu_tanh_, activated<Act::gelu_tanh>(x))
ELEMENTWISE(relu_, activated<Act::relu>(x))
ELEMENTWISE(softcap_30, softcapped(x, 30.0f))
ELEMENTWISE(softcap_none, softcapped(x, 0.0f))
ELEMENTWISE(normed_rms, normed(x, {0.0f, 0.5f}, 3.0f, 0.0f, Norm::rms))
ELEMENTWISE(normed_rms1p, normed(x, {0.0f, 0.5f}, 3.0f, 0.0f, Norm::rms1p))
ELEMENTWISE(normed_layer, normed(x, {2.0f, 0.5f}, 3.0f, 7.0f, Norm::layer))
EXPORT float from_bits(unsigned bits) { return float_of_bits(bits); }
EXPORT long quotient_of(long a, long b) { return quotient(a, b); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if CXX is None:
        missing("no C++ compiler on PATH")
    folder = tmp_path_factory.mktemp("device_math")
    (folder / "math.cpp").write_text(SOURCE)
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}")
    compiled(CXX, *flags, "math.cpp", "-o", "math.so", cwd=folder)
    library = ctypes.CDLL(str(folder / "math.so"))
    library.from_bits.restype = ctypes.c_float
    library.quotient_of.restype = ctypes.c_long
    return library


def apply(library, name, x):
    out = torch.full_like(x, torch.nan)
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_long(x.numel()))
    return out


def assert_close(got, oracle, allowed):
    worst = ((got.double() - oracle).abs() - allowed).nan_to_num(nan=math.inf).argmax()
    assert ((got.double() - oracle).abs() <= allowed).all(), (worst.item(), got[worst].item(), oracle[worst].item())


VALUES = torch.cat([torch.linspace(-20, 20, 40001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([-500.0, 500.0])])


@pytest.mark.parametrize("act", ops.ACTS)
def test_activations(library, act):
    wide = VALUES.double()
    if act == "gelu_tanh":  # torch's 1 + tanh cancels in fp64, too
        oracle = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    else:
        oracle = oracle_gated_act(VALUES, None, act)
    if act == "gelu":  # as in PyTorch, 1 + erf cancels: right to an ulp of the gate, not of the small result
        allowed = wide.abs() * 2.0**-22
    else:  # relative to each value; the exponent's own rounding grows with its size. Below e^-88 only the size is kept.
        allowed = oracle.abs() * 2.0**-20 * (1 + wide.abs()) + 1e-35
    assert_close(apply(library, f"{act}_", VALUES), oracle, allowed)


@pytest.mark.parametrize("act", ops.ACTS)
def test_activations_far_out(library, act):
    gate = torch.tensor([-3.4e38, -1e30, -1e5, -104.0, -89.0, -0.0, 0.0, 1e-42, 1e5, 3.4e38, math.inf, math.nan])
    got = apply(library, f"{act}_", gate)
    assert (got[:5].abs() < 1e-30).all() and got[-1].isnan()
    assert (got[5:8].abs() <= 1e-42).all()
    assert torch.equal(got[8:11], gate[8:11])


def test_softcap(library):
    x = torch.cat([VALUES, torch.tensor([1e4, -1e4])])
    assert_close(apply(library, "softcap_30", x), 30 * torch.tanh(x.double() / 30), x.abs().double() * 2.0**-22)
    assert torch.equal(apply(library, "softcap_none", x), x)


def test_normed_element(library):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    for kind, oracle in (("rms", wide * 1.5), ("rms1p", wide * 2), ("layer", (wide - 2) * 1.5 + 7)):
        assert_close(apply(library, f"normed_{kind}", x), oracle, (oracle.abs() + 10) * 2.0**-23)


def test_bits(library):
    assert library.from_bits(ctypes.c_uint32(0x40490FDB)) == pytest.approx(math.pi, abs=1e-7)
    assert library.from_bits(ctypes.c_uint32(0xFF800000)) == -math.inf


def test_quotient_in_32_and_64_bits(library):
    sizes = (1, 3, 1376, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7)
    for a in (0, *sizes, 2**62):
        for b in sizes:
            assert library.quotient_of(ctypes.c_long(a), ctypes.c_long(b)) == a // b, (a, b)
