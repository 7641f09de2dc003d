"""Compilers that tests use, where they are found, and what their absence means."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CXX = shutil.which("g++") or shutil.which("c++")
CUDA_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def missing(reason: str) -> NoReturn:
    """Skip the test; fail it under CI=true, where the tool is known to be and a skip would go unseen."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"CI=true, but {reason}")
    pytest.skip(reason)


def load_setup():
    spec = importlib.util.spec_from_file_location("pyarith_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(*command, cwd) -> str:
    """Run ``command``, which must succeed; returns all it printed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def nvcc() -> str:
    """Path of nvcc, as the build finds it."""
    return load_setup().nvcc() or missing("no nvcc: set CUDACXX or CUDA_HOME, or put it on PATH")


def cuda_include() -> list[str]:
    """The options by which nvcc itself finds the toolkit's headers."""
    log = subprocess.run([nvcc(), "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    options = re.findall(r'-I[^" ]+', "".join(line for line in log.splitlines() if "INCLUDES=" in line))
    return options or missing(f"nvcc names no folder of headers: {log[-500:]}")
