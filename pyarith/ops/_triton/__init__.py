"""Triton kernels, one module per op; each is imported when its op first runs, since triton is an optional package.

A module ``pyarith.ops._triton.<op>`` holds ``launch(...)``, which takes the tensors of the op's schema.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on ``device`` in ``dtype``, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` adds it"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if dtype not in _DTYPES:
        return f"the Triton kernels compute in float32 and 16-bit types, not in {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0; this device has {capability[0]}.{capability[1]}"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "triton needs a C compiler for its launchers: put gcc on PATH or set CC"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "triton compiles its launchers against Python.h, which is missing: install this Python's headers"
    return None
