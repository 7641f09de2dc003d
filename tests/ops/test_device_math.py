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
from pyarith.ops.masked_adamw import factors_of

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
EXPORT void adamw_(const float* by, int from_grad, const float* g, float* p, float* m, float* v, long n) {
    const AdamwFactors factors{by[0], by[1], from_grad != 0, by[2], by[3], by[4], by[5], by[6]};
    for (long i = 0; i < n; ++i) adamw(factors, g[i], p[i], m[i], v[i]);
}
EXPORT void philox_(unsigned long seed, unsigned* counter) {
    const Words words = philox(seed, {{counter[0], counter[1], counter[2], counter[3]}});
    for (int i = 0; i < 4; ++i) counter[i] = words.at[i];
}
EXPORT unsigned rounded(float x, unsigned noise) { return rounded_by(x, noise); }
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


def test_philox_gives_the_known_answers_of_random123(library):
    for counter, seed, words in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        block = (ctypes.c_uint32 * 4)(*counter)
        library.philox_(ctypes.c_uint64(seed), block)
        assert tuple(block) == words


def test_rounding_with_given_noise(library):
    library.rounded.restype = ctypes.c_uint32
    library.rounded.argtypes = (ctypes.c_float, ctypes.c_uint32)
    one = 0x3F80
    for low, noise, up in ((0, 0xFFFF, 0), (1, 0xFFFF, 1), (1, 0xFFFE, 0), (0x8000, 0x8000, 1), (0xFFFF, 0, 0)):
        x = torch.tensor((one << 16) + low, dtype=torch.int32).view(torch.float32).item()
        assert library.rounded(x, noise) == one + up, (low, noise)
        assert library.rounded(-x, noise) == one + up + 0x8000
    assert library.rounded(math.inf, 0xFFFF) == 0x7F80
    nan = library.rounded(math.nan, 0xFFFF)
    assert nan & 0x7F80 == 0x7F80 and nan & 0x7F


@pytest.mark.parametrize("beta1", (0.9, 0.3, 0.0))
def test_adamw_element(library, beta1):
    factors = factors_of(1e-3, beta1, 0.999, 1e-8, 0.1, 7)
    g, p, m = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    v = m.square() * 1e-3
    wide = [t.double() for t in (g, p, m, v)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (g, p, m, v)]
    by = [value for name, value in factors._asdict().items() if name != "from_grad"]
    library.adamw_((ctypes.c_float * 7)(*by), factors.from_grad, *pointers, ctypes.c_long(1000))
    g, p_wide, m_wide, v_wide = wide
    m_wide = beta1 * m_wide + (1 - beta1) * g
    v_wide = 0.999 * v_wide + 0.001 * g * g
    rate = 1e-3 / (1 - beta1**7)
    p_wide = p_wide * (1 - 1e-4) - rate * m_wide / ((v_wide / (1 - 0.999**7)).sqrt() + 1e-8)
    assert_close(m, m_wide, (wide[2].abs() + g.abs()) * 2.0**-23)
    assert_close(v, v_wide, v_wide * 2.0**-22)
    assert_close(p, p_wide, (wide[1].abs() + 1e-2) * 2.0**-23)
