"""Loads the compiled extension `pyarith._C` and says why its kernels cannot run somewhere.

torch is imported first on purpose: its OpenMP runtime is then the one that the extension binds to.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from pyarith.errors import BackendError, InputError

CPU_LEVELS = ("base", "avx2", "avx512")
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_load_error = ""
_forked = False


def _load() -> Any:
    global _load_error
    try:
        from pyarith import _C
    except ImportError as error:
        _load_error = f"pyarith._C cannot be loaded ({error}); build it with `pip install .`"
        return None
    limit = os.environ.get("PYARITH_CPU", "")
    if limit and limit not in CPU_LEVELS:
        raise InputError(f"environment variable PYARITH_CPU: expected one of {', '.join(CPU_LEVELS)}; got {limit!r}")
    _C.attach(torch.Tensor, cpu_limit=limit or CPU_LEVELS[-1])
    return _C


def _after_fork() -> None:
    # A child that opens a parallel region after its parent did waits for threads that were not copied.
    global _forked
    _forked = True


C = _load()  # None where it is not built: `why_not_cpu` then keeps its callers away
os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads for a CPU kernel: torch's number, one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def why_not_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if C is None:
        return _load_error
    if dtype not in _CPU_DTYPES:
        return f"the C++ kernels compute in float32 and bfloat16, not in {dtype}"
    return None


def launch(kernel: str, *tensors: torch.Tensor | None, **scalars: object) -> None:
    """Start a CUDA kernel of the extension on the device of the first tensor, on torch's current stream there.

    Raises:
        BackendError: CUDA refused the launch.
    """
    first = tensors[0]
    assert first is not None
    with torch.cuda.device(first.device):
        stream = torch.cuda.current_stream(first.device).cuda_stream
        try:
            getattr(C, kernel)(*tensors, **scalars, stream=stream)
        except RuntimeError as error:
            raise BackendError(
                f"{kernel}: CUDA refused the launch on {first.device}: {error}. An earlier kernel may be the cause: "
                "run again with CUDA_LAUNCH_BLOCKING=1, or with backend='reference'"
            ) from error


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if C is None:
        return _load_error
    if not C.build_info()["cuda"]:
        return "pyarith was built without CUDA (no nvcc, or PYARITH_CUDA=0)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if dtype not in _CUDA_DTYPES:
        return f"the CUDA kernels compute in float32 and 16-bit types, not in {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"native code starts at compute capability 8.0; this device has {capability[0]}.{capability[1]}"
    return None


def info() -> dict[str, object]:
    """What was built and what this machine runs, for `pyarith doctor`."""
    if C is None:
        return {"built": False, "reason": _load_error}
    return {"built": True, **C.build_info(), "threads": threads()}
