"""What the compilers make of the GPU kernels: registers, shared memory, spills, vector accesses. Nothing is run.

kernel_resources.csv is the record. Where a compiler of the recorded version is at hand its rows must be met exactly, so
that a change of a kernel shows what it costs:

    python tests/test_kernel_resources.py

records anew. (The Triton kernels have a record of their own, triton_resources.csv.)
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import pytest
from toolchain import CSRC, CUDA_SOURCES, compiled, missing, nvcc

pytestmark = pytest.mark.timeout(400)  # the first test waits for the compilers, on a machine that may be busy
RECORD = Path(__file__).with_name("kernel_resources.csv")
ARCHS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas=-v", f"-I{CSRC}")
ANY_ALIGNMENT = re.compile(r" (streamed|by_elements|by_units<unsigned)")  # these go element by element
ONE_RESULT_PER_ROW = re.compile(r"answer_logits ")  # reads vectors, stores single numbers


@dataclass(frozen=True, order=True)
class Row:
    compiler: str
    compiler_version: str
    arch: str
    kernel: str
    registers: int
    shared_bytes: int
    spill_bytes: int  # spilled, or in a stack frame


def recorded() -> list[Row]:
    with RECORD.open(newline="") as file:
        return [
            Row(*(int(row[f.name]) if f.type == "int" else row[f.name] for f in fields(Row)))
            for row in csv.DictReader(file)
        ]


def write_record(rows: Iterable[Row]) -> None:
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(Row))
        writer.writerows(map(astuple, sorted(rows)))


def short_names(mangled: list[str], stem: str) -> list[str]:
    """`add_norm in_registers<4>`: without namespaces (one is a hash of the path), parameters and return type."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt") or missing("no c++filt to read kernel names with")
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for name in done.stdout.splitlines():
        name = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name)
        names.append(f"{stem} " + re.sub(r"\([^()]*\)$", "", name).removeprefix("void "))
    return names


def nvcc_version() -> str:
    return re.search(r"V(\d+\.\d+\.\d+)", compiled(nvcc(), "--version", cwd=CSRC))[1]


@dataclass(frozen=True)
class Compiled:
    rows: list[Row]
    log: str
    object: Path


def compile_kernels(source: Path, folder: Path) -> Compiled:
    """One .cu for all architectures, by one call of nvcc."""
    target = folder / f"{source.stem}.o"
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
    log = compiled(nvcc(), *FLAGS, *codes, "-c", source, "-o", target, cwd=folder)
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    assert entries, log
    version, names = nvcc_version(), short_names([entry[0] for entry in entries], source.stem)
    rows = []
    for (_, arch, frame, stores, loads, registers, rest), name in zip(entries, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = int(frame) + int(stores) + int(loads)
        rows.append(Row("nvcc", version, arch, name, int(registers), int(shared[1]) if shared else 0, spilled))
    return Compiled(rows, log, target)


def compile_all(folder: Path) -> dict[str, Compiled]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda source: compile_kernels(source, folder), CUDA_SOURCES)
        return {source.stem: result for source, result in zip(CUDA_SOURCES, done, strict=True)}


def check_limits(rows: Iterable[Row]) -> None:
    for row in rows:
        assert row.spill_bytes == 0, f"spills or has a stack frame: {row}"
        assert row.registers <= 128, f"leaves room for two blocks of 256 threads at most: {row}"
        assert row.shared_bytes <= 48 << 10, f"more static shared memory than a block may have: {row}"


def check_record(rows: Iterable[Row], known: Iterable[Row]) -> None:
    """The rows just made are those recorded with the same compiler; nothing to compare with for another one."""
    rows = set(rows)
    versions = {(row.compiler, row.compiler_version) for row in rows}
    known = {row for row in known if (row.compiler, row.compiler_version) in versions}
    if not known:
        return
    lines = [("- " if row in known else "+ ") + ",".join(map(str, astuple(row))) for row in sorted(rows ^ known)]
    lines.sort(key=lambda line: line[2:])
    assert not lines, "\n".join(
        [
            "kernels and kernel_resources.csv (-) differ: run `python tests/test_kernel_resources.py` to record anew",
            *lines,
        ]
    )


def machine_code(binary: Path) -> dict[tuple[str, str], str]:
    """(architecture, mangled name) -> SASS, by the disassembler in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    if tool is None or not tool.exists():
        missing("no cuobjdump: it comes with triton's wheel")
    code, arch = {}, ""
    for part in re.split(
        r"^(?=\s*(?:arch = |Function : ))", compiled(tool, "--dump-sass", binary, cwd=CSRC), flags=re.M
    ):
        if found := re.match(r"\s*arch = (\w+)", part):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\w+)", part):
            code[arch, found[1]] = part
    return code


def check_machine_code(binary: Path, stem: str) -> None:
    code = machine_code(binary)
    assert {arch for arch, _ in code} == set(ARCHS)
    for ((arch, _), text), name in zip(code.items(), short_names([name for _, name in code], stem), strict=True):
        local = re.findall(r"\b(?:LDL|STL)\b.*", text)
        assert not local, f"{name} on {arch} keeps variables in local memory: {local[0]}"
        if ANY_ALIGNMENT.search(name):
            continue
        for access, kind in (("LDG", "loads"), ("STG", "stores")):
            found = re.search(rf"\b{access}\.E\.(?:\w+\.)*128\b", text) is not None
            spared = access == "STG" and ONE_RESULT_PER_ROW.search(name)
            assert found or spared, f"{name} on {arch} has no 128-bit global {kind}"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("kernels"))


STEMS = [source.stem for source in CUDA_SOURCES]


@pytest.mark.parametrize("stem", STEMS)
def test_compiles_without_spills(kernels, stem):
    result = kernels[stem]
    assert {row.arch for row in result.rows} == set(ARCHS)
    check_limits(result.rows)
    assert "C7510" not in result.log, "ptxas serialised wgmma: " + result.log


@pytest.mark.parametrize("stem", STEMS)
def test_moves_vectors_and_keeps_variables_in_registers(kernels, stem):
    check_machine_code(kernels[stem].object, stem)


def test_resources_are_those_recorded(kernels):
    check_record([row for result in kernels.values() for row in result.rows], recorded())


INDEXED = """
__global__ void indexed(const int* in, int* out) {  // an array indexed at run time has no place in registers
    int mine[64] = {};
    for (int i = 0; i < 64; ++i) mine[in[i] & 63] += i;
    out[threadIdx.x] = mine[in[threadIdx.x] & 63];
}
"""
SCALAR = "__global__ void scalar(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x]; }"
VECTORS = "__global__ void vectors(const int4* in, int4* out) { out[threadIdx.x] = in[threadIdx.x]; }"


def test_planted_errors_are_found(tmp_path):
    def result_of(*kernels):
        (tmp_path / "planted.cu").write_text("\n".join(kernels))
        return compile_kernels(tmp_path / "planted.cu", tmp_path)

    result = result_of(INDEXED, VECTORS)
    with pytest.raises(AssertionError, match=r"spills or has a stack frame: .*planted indexed"):
        check_limits(result.rows)
    with pytest.raises(AssertionError, match="planted indexed on sm_80 keeps variables in local memory"):
        check_machine_code(result.object, "planted")
    result = result_of(SCALAR, VECTORS)
    check_limits(result.rows)
    with pytest.raises(AssertionError, match="planted scalar on sm_80 has no 128-bit global loads"):
        check_machine_code(result.object, "planted")


def test_a_change_of_resources_is_found():
    row = Row("nvcc", "13.0.88", "sm_80", "add_norm streamed", 22, 128, 0)
    other = Row("nvcc", "13.0.88", "sm_90a", "add_norm streamed", 20, 128, 0)
    newer = Row("nvcc", "13.1.0", "sm_80", "add_norm streamed", 24, 128, 0)
    check_record([row], [row])
    check_record([newer], [row])  # another compiler: nothing to compare with
    for known in ([Row("nvcc", "13.0.88", "sm_80", "add_norm streamed", 21, 128, 0)], [row, other]):
        with pytest.raises(AssertionError, match=r"run `python tests/test_kernel_resources\.py` to record anew"):
            check_record([row], known)
    for bad, words in ((dict(registers=130), "leaves room"), (dict(shared_bytes=50000), "shared memory")):
        with pytest.raises(AssertionError, match=words):
            check_limits([replace(row, **bad)])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for result in compile_all(Path(folder)).values() for row in result.rows]
    check_limits(rows)
    write_record(rows)
    print(f"{RECORD}: {len(rows)} rows of nvcc {rows[0].compiler_version}")


if __name__ == "__main__":
    main()
