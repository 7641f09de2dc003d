"""Functions that kernels share; only operations that the interpreter and every supported Triton have."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the parameters of a kernel have no Python types)

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b, accumulated in fp32: tensor cores for 16-bit factors, IEEE products for fp32, never TF32.

    UPCAST: the interpreter multiplies the bit patterns of bf16, so there the factors are widened first. That changes no
    product: bf16 times bf16 is exact in fp32.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh to a few fp32 roundings: from |x| = 0.6 on by exp, below, where that cancels, by the continued fraction.

    Cut after its fifth level the fraction is off by less than 3e-9 up to 0.6. A NaN stays one.
    """
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def softcapped(x, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(x / softcap) where CAPPED, else x."""
    if CAPPED:
        x = softcap * tanh(x / softcap)
    return x
