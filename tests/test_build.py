"""What can be known of the build without building the package and without a GPU."""

import re
import shutil
from pathlib import Path

import pytest
from toolchain import CSRC, CXX, ROOT, compiled, load_setup

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler on PATH")


def pyproject():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@needs_compiler
def test_rows_are_laid_over_blocks(tmp_path):
    (tmp_path / "check.cpp").write_text("""
#include "cuda/plan.h"
#include <cstdio>
using namespace pyarith::cuda;
int main() {
    for (long d = 1; d < 40000; ++d)
        for (int aligned = 0; aligned < 2; ++aligned) {
            if (aligned && d % 8) continue;
            const auto plan = row_plan(d, aligned, 8);
            bool right = plan.threads % 32 == 0 && plan.threads >= 32 && plan.threads <= most_threads;
            if (plan.vectors) right = right && aligned && 8L * plan.vectors * plan.threads >= d;
            if (aligned && d <= 16384) right = right && plan.vectors;
            if (!right) { std::printf("%ld %d: %d %d\\n", d, aligned, plan.threads, plan.vectors); return 1; }
        }
    static_assert(row_plan(768, true, 8).threads == 96 && row_plan(768, true, 8).vectors == 1, "");
    static_assert(row_plan(8192, true, 8).threads == 256 && row_plan(8192, true, 8).vectors == 4, "");
}
""")
    compiled(CXX, "-std=c++17", f"-I{CSRC}", "check.cpp", "-o", "check", cwd=tmp_path)
    compiled("./check", cwd=tmp_path)


@needs_compiler
@pytest.mark.parametrize(
    "source", sorted(p for p in (CSRC / "cpu").glob("*.cpp") if p.stem != "launch"), ids=lambda p: p.stem
)
def test_kernels_share_no_inline_function(source, tmp_path):
    """A weak symbol compiled with AVX-512 could become the copy that every level calls: illegal on older processors.

    Also shows that the base kernels build without OpenMP and without any instruction set flag.
    """
    compiled(CXX, "-std=c++17", "-O2", "-Wno-psabi", f"-I{CSRC}", "-c", source, "-o", "kernel.o", cwd=tmp_path)
    flags = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"]
    if "x86" in compiled(CXX, "-dumpmachine", cwd=tmp_path):
        compiled(
            CXX,
            "-std=c++17",
            "-O2",
            "-fopenmp",
            "-Wno-psabi",
            f"-I{CSRC}",
            *flags,
            "-c",
            source,
            "-o",
            "kernel.o",
            cwd=tmp_path,
        )
    if shutil.which("nm") is None:
        pytest.skip("compiled, but no nm to list symbols with")
    shared = [
        line for line in compiled("nm", "-C", "kernel.o", cwd=tmp_path).splitlines() if re.search(r" [WVu] ", line)
    ]
    assert all("DW.ref.__gxx_personality" in line for line in shared), shared


def test_cuda_switch(monkeypatch):
    setup = load_setup()

    def arguments():
        return setup.cmake_arguments(Path("out"))

    monkeypatch.setenv("PYARITH_CUDA", "yes")
    with pytest.raises(SystemExit, match="PYARITH_CUDA: expected 0, 1 or auto; got 'yes'"):
        arguments()
    monkeypatch.setattr(setup, "nvcc", lambda: None)
    monkeypatch.setattr(setup, "tool", lambda name: name)
    monkeypatch.setenv("PYARITH_CUDA", "1")
    with pytest.raises(SystemExit, match="PYARITH_CUDA=1 but no nvcc was found"):
        arguments()
    monkeypatch.setenv("PYARITH_CUDA", "auto")
    pytest.importorskip("pybind11")
    assert "-DPYARITH_CUDA=0" in arguments()
    monkeypatch.setattr(setup, "nvcc", lambda: "/somewhere/nvcc")
    assert {"-DPYARITH_CUDA=auto", "-DCMAKE_CUDA_COMPILER=/somewhere/nvcc"} <= set(arguments())
    monkeypatch.setenv("PYARITH_CUDA", "0")
    assert not any("nvcc" in argument for argument in arguments())


def test_where_nvcc_is_looked_for(monkeypatch, tmp_path):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert load_setup().nvcc() == str(home / "bin" / "nvcc")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "gone"))  # named and not there: nothing else is tried
    assert load_setup().nvcc() is None


def test_every_demo_file_is_package_data():
    project = pyproject()
    demo = ROOT / "pyarith" / "demo"
    patterns = project["tool"]["setuptools"]["package-data"]["pyarith.demo"]
    packed = {path for pattern in patterns for path in demo.glob(pattern)}
    there = {path for path in demo.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there <= packed, there - packed
    assert sum(path.stat().st_size for path in packed) < 10 * 2**20


def test_constraints_are_plain_pins_of_known_dependencies():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in pins), pins
    project = pyproject()["project"]
    required = {re.split(r"[>=<]", line)[0] for line in project["dependencies"]}
    assert required <= {line.split("==")[0] for line in pins}
