"""Builds CUDA sources with g++ so that they run on the CPU, strictly checked (runtime.cpp says how)."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from toolchain import CSRC, CUDA_SOURCES, CXX, compiled, cuda_include, missing

HERE = Path(__file__).resolve().parent
PLAIN = ("-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}", f"-I{HERE}")
# Contraction is off so that the numbers do not depend on the processor; nvcc contracts a * b + c.
# Not strict about aliasing: neither is nvcc, and vector accesses rely on it.
EMULATED = (
    "-O1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero",
    "-Wno-unknown-pragmas",
    "-include",
    str(HERE / "shim.h"),
)
MODULE_FLAGS = (
    "-O0",
    "-w",
    "-DPYARITH_WITH_CUDA",
    "-DPYARITH_CUDA_DEVICE_TYPE=1",
    '-DPYARITH_CUDA_ARCHS="CPU"',
    '-DPYARITH_CUDA_VERSION="none"',
    '-DPYARITH_COMPILER="g++"',
)
ORDERS = ((False, False), (True, False), (False, True))  # (threads downwards, blocks downwards)


def _link(folder: Path, jobs: Iterable[tuple[Path, tuple[str, ...]]], name: str) -> Path:
    """Compile each source with its flags, several at a time, and link them into ``folder / name``."""
    if CXX is None:
        missing("no C++ compiler on PATH")
    include = cuda_include()

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> Path:
        source, flags = job
        target = folder / f"{source.parent.name}_{source.stem}.o"
        compiled(CXX, *PLAIN, *flags, *include, "-x", "c++", "-c", source, "-o", target, cwd=folder)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    compiled(CXX, "-shared", *objects, "-o", folder / name, cwd=folder)
    return folder / name


_RUNTIME = (HERE / "runtime.cpp", ("-O2", "-U_FORTIFY_SOURCE"))  # fortified longjmp takes fibers for a damaged stack


class Emulator:
    """The controls of one built library."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    @contextmanager
    def order(self, threads_down: bool, blocks_down: bool) -> Iterator[None]:
        self.library.emulator_order(threads_down, blocks_down)
        try:
            yield
        finally:
            self.library.emulator_order(False, False)

    @contextmanager
    def only(self, *buffers: tuple[torch.Tensor, str]) -> Iterator[None]:
        """Within, kernels may touch nothing but these tensors, each for "r", "w" or "rw", and without a race."""
        for tensor, mode in buffers:
            for piece in [tensor] if tensor.is_contiguous() else tensor.flatten(0, -2).unbind():
                self.library.emulator_allow(
                    ctypes.c_void_p(piece.data_ptr()),
                    ctypes.c_int64(piece.numel()),
                    ctypes.c_int64(piece.itemsize),
                    "r" in mode,
                    "w" in mode,
                )
        try:
            yield
        finally:
            self.library.emulator_forbid()


def build_kernels(folder: Path, sources: Iterable[Path]) -> Emulator:
    """CUDA sources alone; their ``extern "C"`` functions are reached through ``library``."""
    return Emulator(_link(folder, [_RUNTIME, *((source, EMULATED) for source in sources)], "kernels.so"))


def build_module(folder: Path) -> tuple[ModuleType, Emulator]:
    """The extension with its real bindings, whose CUDA functions take CPU tensors and run emulated."""
    if importlib.util.find_spec("pybind11") is None:
        missing("pybind11 is not installed")
    import pybind11

    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    jobs = [
        (CSRC / "bindings.cpp", MODULE_FLAGS + python),
        *((source, EMULATED) for source in CUDA_SOURCES),
        _RUNTIME,
        # The CPU kernels are linked, never called here.
        *((source, ("-O0", "-w")) for source in sorted((CSRC / "cpu").glob("*.cpp"))),
    ]
    library = _link(folder, jobs, "_C.so")
    # A private name: the installed pyarith._C stays what it is.
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_cpu._C", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    module.attach(torch.Tensor, cpu_limit="base")
    return module, Emulator(library)
