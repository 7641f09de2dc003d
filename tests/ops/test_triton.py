"""Triton kernels: interpreted against fp64, compiled for every architecture, and run where there is a GPU.

`python tests/ops/test_triton.py` records `tests/triton_resources.csv` anew, with the installed Triton and, where
PYARITH_OTHER_TRITON names a folder with another one, with that too.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import make
from toolchain import missing

from pyarith import ops
from pyarith.errors import BackendError
from pyarith.ops import _registry

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "triton_resources.csv"
COLUMNS = ("compiler", "compiler_version", "arch", "kernel", "registers", "shared_bytes", "spill_bytes")
ARCHS = ("80", "90", "100")
# opt-in shared memory of a block: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100; all variants keep to what sm_86, sm_89
# and sm_120 have, whose code is compiled from the same launchers
SHARED = 99 * 1024
KERNELS = (
    "head_write_rows",
    "vocab_logsumexp",
    "shared_prefix_attention",
    "slice_grad",
    "masked_adamw",
    "gate_up_candidate",
)
# what the tests compile: all variants for one architecture, for the others the main ones; of the other release those
# whose machine code differs in kind. The table holds all variants of all, made by this file as a command.
MAIN = "7B|fp32|d_head (128|256)"
VERSIONS = {"installed": ("90", f"80:{MAIN}", f"100:{MAIN}"), "other": ("100:fp32",)}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def folders(version):
    """What goes before everything else on PYTHONPATH to have this Triton."""
    if version == "other":
        other = os.environ.get("PYARITH_OTHER_TRITON")
        return [other] if other else missing("PYARITH_OTHER_TRITON names no folder with another release of Triton")
    return [] if importlib.util.find_spec("triton") else missing("triton is not installed")


def python(*arguments, version="installed", **environment):
    """Run a fresh interpreter; returns what it printed."""
    path = [*folders(version), ROOT, ROOT / "tests", ROOT / "tests" / "ops", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(str, path)))} | environment,
        capture_output=True,
        text=True,
    )
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"exit {done.returncode} after: {last}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_against_fp64(kernel):
    printed = python(Path(__file__).with_name("triton_checks.py"), kernel, TRITON_INTERPRET="1")
    assert printed.splitlines()[-1].startswith("done:")


def compiled(version, *archs, cache):
    """The JSON lines of triton_variants.py."""
    script = Path(__file__).with_name("triton_variants.py")
    printed = python(script, *archs, version=version, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0")
    return [json.loads(line) for line in printed.splitlines()]


def recorded():
    """Lines of the table."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def lines(rows):
    """What the table should hold of compiled variants."""
    return [
        {"compiler": "triton", "compiler_version": row["version"]} | {name: str(row[name]) for name in COLUMNS[2:]}
        for row in rows
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", VERSIONS)
def test_compiled(version, tmp_path):
    rows = compiled(version, *VERSIONS[version], cache=tmp_path)
    for row in rows:
        assert row["spill_bytes"] == row["spill_instructions"] == 0, f"spills: {row}"
        assert row["registers"] <= 255 and row["shared_bytes"] <= SHARED, row
        # fp32 products must have no matrix instruction at all: it would be TF32
        used = set(row["tensor_cores"])
        assert used & set(row["wanted"]) if row["wanted"] else not used, f"matrix instructions: {row}"
        assert not row["narrow"], f"{row['kernel']}: offsets in 32 bits: {row['narrow']}"
    now = lines(rows)
    known = [line for line in recorded() if line["compiler_version"] == now[0]["compiler_version"]]
    places = {(line["arch"], line["kernel"]) for line in now}
    changes = [f"recorded {line}" for line in known if (line["arch"], line["kernel"]) in places and line not in now]
    changes += [f"now      {line}" for line in now if line not in known]
    assert {line["kernel"] for line in known} <= {line["kernel"] for line in now} or version == "other"
    assert not known or not changes, "\n".join(
        [f"{TABLE.name} differs; `python tests/ops/{Path(__file__).name}` records it anew:", *changes]
    )


def test_table_holds_the_release_of_ci():
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("triton==")]
    assert pinned[0].partition("==")[2] in {line["compiler_version"] for line in recorded()}


def test_triton_is_imported_only_when_a_kernel_starts():
    code = "import sys, pyarith.ops as ops; ops.report(); assert 'triton' not in sys.modules, 'triton was imported'"
    python("-c", code)


@pytest.mark.parametrize("op", ("head_write_rows", "vocab_logsumexp", "shared_prefix_attention", "slice_grad"))
def test_auto_takes_triton_first_on_a_gpu_that_can(op, monkeypatch, tmp_path):
    folders("installed")
    monkeypatch.setattr(_registry, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda *names: tmp_path)
    (tmp_path / "Python.h").touch()
    assert ops.backend_of(op, "cuda:0") == "triton"
    assert ops.backend_of(op, "cuda:0", torch.float64) != "triton"
    monkeypatch.setattr(_registry, "_chosen", {})
    for name, value, words in (
        ("sysconfig.get_path", lambda *names: "nowhere", "against Python.h"),
        ("shutil.which", lambda name: None, "needs a C compiler"),
        ("torch.cuda.get_device_capability", lambda device: (7, 5), "need compute capability 8.0; this device has 7.5"),
    ):
        monkeypatch.setattr(name, value)
        assert words in ops.why_not(op, "triton", torch.device("cuda", 0), torch.float32)
    assert ops.backend_of(op, "cuda:0") != "triton"


def test_a_kernel_that_cannot_start_names_itself():
    folders("installed")
    from triton.runtime.errors import OutOfResources

    from pyarith.ops._triton._launch import Launch

    class Kernel:
        __name__ = "some_kernel"

        def __getitem__(self, grid):
            raise OutOfResources(3, 2, "shared memory")

    with pytest.raises(BackendError, match=r"some_kernel: Triton could not run the kernel on cpu: .*shared memory"):
        Launch(Kernel(), 1, {}, 4, 1).start(torch.empty(1))
    Launch(Kernel(), 0, {}, 4, 1).start(torch.empty(0))  # nothing to do


@needs_gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_on_the_gpu_against_fp64(kernel):
    from triton_checks import CHECKS

    for _ in CHECKS[kernel]("cuda"):
        pass


@needs_gpu
def test_more_than_32_bits_of_elements_on_the_gpu():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    far = 2**30  # the third row begins beyond 2^31
    dz, base = make(3, 2, 16).cuda(), make(3, 24).cuda()
    w_o = make(2, 16, 24).cuda()
    buffer = torch.empty(2 * far + 32, device="cuda")
    expected = ops.head_write_rows(base, dz, w_o, backend="reference")
    spread = buffer.as_strided(dz.shape, (far, 16, 1)).copy_(dz)
    assert torch.allclose(ops.head_write_rows(base, spread, w_o, backend="triton"), expected, atol=1e-5)
    spread = buffer.as_strided(base.shape, (far, 1)).copy_(base)
    assert torch.allclose(ops.head_write_rows(spread, dz, w_o, backend="triton"), expected, atol=1e-5)
    expected = ops.vocab_logsumexp(base, base, backend="reference")
    assert torch.allclose(ops.vocab_logsumexp(spread, spread, backend="triton"), expected, atol=1e-5)
    q, k, lengths = make(1, 3, 2, 8).cuda(), make(3, 5, 2, 8).cuda(), torch.tensor([5, 2, 4], device="cuda")
    expected = ops.shared_prefix_attention(q, k, k, q, q, lengths, scale=1.0, backend="reference")
    spread = buffer.as_strided(k.shape, (far, 16, 8, 1)).copy_(k)
    got = ops.shared_prefix_attention(q, spread, spread, q, q, lengths, scale=1.0, backend="triton")
    assert torch.allclose(got, expected, atol=1e-5)
    left, ranges = make(3, 40).cuda(), ((0, 8), (16, 33))
    expected, got = (torch.empty(25, 24, device="cuda") for _ in range(2))
    ops.slice_grad(left, base, expected, ranges, backend="reference")
    spread = buffer.as_strided(left.shape, (far, 1)).copy_(left)
    assert torch.allclose(ops.slice_grad(spread, base, got, ranges, backend="triton"), expected, atol=1e-5)
    assert torch.allclose(ops.slice_grad(base, spread, got.T.contiguous(), None, ranges), expected.T, atol=1e-5)
    wide = buffer.as_strided((3, 24), (far, 1))
    ops.slice_grad(left, base, wide, ((0, 2), (39, 40)), backend="triton")
    ops.slice_grad(left, base, expected[:3], ((0, 2), (39, 40)), backend="reference")
    assert torch.allclose(wide, expected[:3], atol=1e-5)


@needs_gpu
def test_captured_in_a_graph():
    dz, w_o, out = (t.cuda() for t in (make(3, 2, 16), make(2, 16, 24), torch.empty(2, 3, 24)))
    normed, total = make(5, 16).cuda(), torch.empty(5, device="cuda")
    grad = torch.empty(9, 16, device="cuda")

    def all_three():
        ops.head_write_rows(None, dz, w_o, out=out, backend="triton")
        ops.vocab_logsumexp(normed, normed, out=total, backend="triton")
        ops.slice_grad(normed, normed, grad, ((0, 5), (8, 12)), backend="triton")  # a table is made on the device

    all_three()  # compiles
    expected = out.clone(), total.clone(), grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_three()
    out.fill_(torch.nan), total.fill_(torch.nan), grad.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, (out, total, grad), expected))


def main() -> None:
    """Record the table; lines of releases that are not at hand stay."""
    import tempfile

    now = []
    with tempfile.TemporaryDirectory() as cache:
        for version in list(VERSIONS) if os.environ.get("PYARITH_OTHER_TRITON") else ["installed"]:
            now += lines(compiled(version, *ARCHS, cache=cache))
    versions = {line["compiler_version"] for line in now}
    now += [line for line in recorded() if line["compiler_version"] not in versions] if TABLE.exists() else []
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(now, key=lambda line: tuple(line.values())))


if __name__ == "__main__":
    main()
