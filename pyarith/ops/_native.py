"""Loads the compiled extension `pyarith._C` and says why its kernels cannot run somewhere.

torch is imported first on purpose: its OpenMP runtime is then the one that the extension binds to.
"""

from __future__ import annotations

import os
import re
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


def launch(kernel: str, *operands: Any, **scalars: object) -> None:
    """Start a CUDA kernel of the extension on the device of the first tensor, on torch's current stream there.

    Args:
        operands: its positional arguments, the first a tensor or a list of tensors.
        scalars: its other arguments by name.
    Raises:
        BackendError: CUDA refused the launch.
    """
    first = operands[0][0] if isinstance(operands[0], list) else operands[0]
    with torch.cuda.device(first.device):
        stream = torch.cuda.current_stream(first.device).cuda_stream
        try:
            getattr(C, kernel)(*operands, **scalars, stream=stream)
        except RuntimeError as error:
            raise BackendError(
                f"{kernel}: CUDA refused the launch on {first.device}: {error}. An earlier kernel may be the cause: "
                "run again with CUDA_LAUNCH_BLOCKING=1, or with backend='reference'"
            ) from error


def runs_code_of(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs``, a CMake list such as "80-real 90a-real 100-virtual", runs on ``capability``.

    Machine code runs within its major version from its minor version on, PTX ("virtual") on anything newer; a suffix
    "a" ties either to exactly that device, "f" to its major version. What is no number ("native") is believed.
    """
    for arch in archs.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual|)", arch)
        if found is None:
            return True
        built, suffix, kind = (int(found[1]), int(found[2])), found[3], found[4]
        if suffix == "a":
            runs = capability == built
        elif suffix == "f" or kind == "-real":
            runs = capability[0] == built[0] and capability >= built
        else:
            runs = capability >= built
        if runs:
            return True
    return False


def _why_no_cuda_device() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        text = str(error).strip().splitlines() or ["no reason given"]
        return f"torch cannot start CUDA: {text[0]} (see `nvidia-smi` and CUDA_VISIBLE_DEVICES)"
    return "torch sees no CUDA device: see `nvidia-smi` and CUDA_VISIBLE_DEVICES"


def _why_driver_too_old() -> str | None:
    # Only the major version counts: within one, machine code built by a newer toolkit runs on an older driver.
    driver, runtime = C.cuda_versions()
    if driver // 1000 >= runtime // 1000:
        return None
    needs, has = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return (
        f"the driver supports CUDA {has}, but pyarith was built with CUDA {needs}: "
        f"update the driver, or rebuild with an nvcc of CUDA {driver // 1000}"
    )


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot run there: one line that says what is missing and what to do, or None."""
    if C is None:
        return _load_error
    build = C.build_info()
    if not build["cuda"]:
        return "pyarith was built without CUDA: put nvcc on PATH and build again with PYARITH_CUDA=1"
    reason = _why_no_cuda_device() or _why_driver_too_old()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    found = f"{capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, this device has {found}: use backend='reference'"
    if not runs_code_of(build["cuda_archs"], capability):
        return (
            f"this build has code for {build['cuda_archs']}, none for this device of compute capability {found}: "
            f"build again with PYARITH_CUDA_ARCHS={capability[0]}{capability[1]}-real"
        )
    if dtype not in _CUDA_DTYPES:
        return f"the CUDA kernels compute in float32, bfloat16 and float16, not in {dtype}: use backend='reference'"
    return None


def info() -> dict[str, object]:
    """What was built and what this machine runs, for `pyarith doctor`."""
    if C is None:
        return {"built": False, "reason": _load_error}
    return {"built": True, **C.build_info(), "threads": threads()}
