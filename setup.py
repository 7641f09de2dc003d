"""Builds the extension `pyarith._C` by CMake and ninja; everything else about the package is in pyproject.toml.

Environment: PYARITH_CUDA=0|1|auto (default auto: with CUDA where nvcc is found), PYARITH_CUDA_ARCHS (a CMake list
such as "90a-real"), MAX_JOBS, CXX, CUDACXX, CUDA_HOME.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name):
    """Path of cmake or ninja: on PATH, or inside the package of that name when PATH lacks the environment's bin."""
    found = shutil.which(name)
    if found is None:
        package = importlib.import_module(name)
        folder = package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR
        found = str(Path(folder) / name)
    return found


def nvcc():
    """Path of nvcc, or None: CUDACXX alone where it is set, else in CUDA_HOME, on PATH, in the usual folder."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None, "/usr/local/cuda"]
    candidates = [named] if named else [str(Path(home) / "bin" / "nvcc") if home else "nvcc" for home in homes]
    return next((path for path in map(shutil.which, candidates) if path), None)


def cmake_arguments(output):
    cuda = os.environ.get("PYARITH_CUDA", "auto").lower()
    if cuda not in ("0", "1", "auto"):
        raise SystemExit(f"PYARITH_CUDA: expected 0, 1 or auto; got {cuda!r}")
    compiler = None if cuda == "0" else nvcc()
    if cuda == "1" and compiler is None:
        raise SystemExit("PYARITH_CUDA=1 but no nvcc was found: put it on PATH, set CUDACXX, or use PYARITH_CUDA=0")
    if cuda == "auto" and compiler is None:
        cuda = "0"
    import pybind11

    arguments = [
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPYARITH_OUTPUT={output}",
        f"-DPYARITH_CUDA={cuda}",
        f"-DPYARITH_CUDA_ARCHS={os.environ.get('PYARITH_CUDA_ARCHS', '')}",
    ]
    return arguments + ([f"-DCMAKE_CUDA_COMPILER={compiler}"] if compiler else [])


class BuildExtension(build_ext):
    def build_extension(self, extension):
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        arguments = cmake_arguments(output)
        # One folder per configuration: a stale CMake cache would otherwise decide what is built. Compilers are
        # not arguments, but CMake reads them from these variables.
        compilers = [
            f"{key}={os.environ.get(key, '')}" for key in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
        ]
        key = hashlib.sha256("\n".join([sys.version, *arguments, *compilers]).encode()).hexdigest()[:12]
        folder = Path(self.build_temp).resolve() / key
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([tool("cmake"), "-S", str(ROOT), "-B", str(folder), *arguments], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([tool("cmake"), "--build", str(folder), "--parallel", jobs], check=True)


if __name__ == "__main__":
    setup(ext_modules=[Extension("pyarith._C", sources=[])], cmdclass={"build_ext": BuildExtension})
