"""The one rule for a kernel's error, and the floors per dtype.

error(kernel, fp64 oracle) <= 2 x error(plain PyTorch in the same dtype, fp64 oracle) + FLOOR[dtype]

Errors are the largest absolute difference over the largest absolute value of the oracle. The floor is for inputs on
which plain PyTorch happens to be exact: one rounding of the result for 16-bit types, four for fp32 and fp64.
"""

from __future__ import annotations

import torch

FLOOR = {
    torch.float64: 2.0**-50,
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest |actual - oracle| over the largest |oracle|; 0 for empty tensors, infinite where only one is finite."""
    assert actual.shape == oracle.shape, (actual.shape, oracle.shape)
    if oracle.numel() == 0:
        return 0.0
    actual, oracle = actual.double(), oracle.double()
    if not torch.equal(actual.isfinite(), oracle.isfinite()):
        return float("inf")
    scale = oracle.abs().max().item()
    return (actual - oracle).abs().max().item() / (scale if scale > 0 else 1.0)


def assert_within_rule(kernel: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor, what: str = "") -> None:
    """Fail unless the kernel's error obeys the rule of this file in the dtype of ``kernel``."""
    got, allowed = error(kernel, oracle), 2 * error(eager, oracle) + FLOOR[kernel.dtype]
    assert got <= allowed, f"{what}: error {got:.3g} against fp64, allowed {allowed:.3g} ({kernel.dtype})"
