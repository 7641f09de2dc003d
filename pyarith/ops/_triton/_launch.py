"""What the launchers share: a launch as data, so that what would run on a device can be compiled without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any

import torch
from triton import knobs
from triton.errors import TritonError

from pyarith.errors import BackendError

INTERPRETED: bool = knobs.runtime.interpret  # read once, as the kernels' decorators do
MATRIX_DTYPES = (torch.bfloat16, torch.float16)  # what the tensor cores multiply exactly, with fp32 accumulation

# Tiles of fp32 products have at most this many rows: from 64 on, Triton 3.6 multiplies in TF32 on compute capability
# 10.0, whatever `input_precision` says (seen in the machine code; the tests look for it).
IEEE_ROWS = 32


@dataclass(frozen=True)
class Launch:
    """One start of a kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        programs: length of its one-dimensional grid.
        arguments: every parameter of the kernel by name, constants included.
        contracted: may a product and the sum it goes into become one operation? The fp32 products of matrices need it,
            a multiply and an add each would halve their rate. Said in any case: Triton's default differs by version.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    contracted: bool = True

    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.contracted}

    def start(self, out: torch.Tensor) -> None:
        """Run on the device of ``out``, on torch's current stream there.

        Raises:
            BackendError: Triton could not compile or start the kernel.
        """
        if self.programs == 0:
            return
        try:
            with torch.cuda.device_of(out):
                self.kernel[(self.programs,)](**self.arguments, **self.options())
        except (TritonError, RuntimeError, CalledProcessError) as error:
            raise BackendError(
                f"{self.kernel.__name__}: Triton could not run the kernel on {out.device}: {error}; "
                "run again with backend='reference'"
            ) from error


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``size``, kept between ``least`` and ``most``."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def vectorised(tensor: torch.Tensor) -> bool:
    """Can rows of this tensor be read 16 bytes at a time, as far as its strides say?"""
    return 1 in tensor.stride() and all(step == 1 or step % 16 == 0 for step in tensor.stride())


def strides(name: str, tensor: torch.Tensor | None, *axes: str) -> dict[str, int]:
    """Kernel arguments ``<name of the tensor's argument>_<axis>``: its strides, 0 where there is no tensor.

    The tests know strides by these names, and that a kernel widens each of them to 64 bits before it multiplies.
    """
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=True)}
