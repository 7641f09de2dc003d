"""The table of backends, the torch entries, repeatability, forked children, and the CPU levels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LEVELS, entry, make, mapped, samples, tensors_in
from torch.library import opcheck

from pyarith import ops
from pyarith.errors import BackendError, InputError
from pyarith.ops import _registry

OPS = tuple(sorted(samples()))
WITHOUT_CPU = {"ablate_heads", "shared_prefix_attention", "slice_grad"}
CASES = [(op, i) for op, calls in samples().items() for i in range(len(calls))]


def clones(args):
    return tuple(mapped(args, lambda a: a.clone() if a.is_contiguous() else a))


def run(op, args, backend="auto"):
    """The op's torch entry on copies of ``args``; returns the copies."""
    copies = clones(args)
    entry(op)(*copies, backend=backend)
    return tensors_in(copies)


@pytest.mark.parametrize("op, i", CASES)
def test_opcheck(op, i):
    args = samples()[op][i]
    opcheck(entry(op), args)
    opcheck(entry(op), args, {"backend": "reference"})


@pytest.mark.parametrize("op, i", CASES)
def test_compiles_without_a_graph_break(op, i):
    args = samples()[op][i]
    torch._dynamo.reset()

    def function(*args):
        entry(op)(*args)
        return tensors_in(args)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*clones(args)), run(op, args), strict=True):
        assert torch.equal(got, expected)


def test_wrappers_compile_with_inductor():
    torch._dynamo.reset()

    def function(row, weight, dz, w_o, targets):
        rows = ops.head_write_rows(row[0], dz, w_o)
        logits = ops.answer_logits(rows, None, weight, None, 1e-5, "rms", targets)
        hidden = ops.add_norm(rows, None, row[0], weight, None, 1e-5, "rms")  # changes rows after they were read
        return rows, logits, ops.gated_act(hidden, hidden, "gelu", out=hidden)

    args = (make(1, 2, 17), make(17), make(2, 3, 4), make(3, 4, 17), make(2, 2, 17))
    compiled = torch.compile(function, fullgraph=True)
    for got, expected in zip(compiled(*args), function(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op, i", CASES)
def test_bitwise_repeatable(op, i):
    args = samples()[op][i]
    backend = ops.backend_of(op)
    first = run(op, args, backend)
    for _ in range(100):
        assert all(map(torch.equal, run(op, args, backend), first))


def test_bitwise_the_same_for_any_number_of_threads():
    row, delta, weight = make(64, 8, 257), make(64, 8, 257, seed=1), make(257)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = row.clone()
            out = ops.add_norm(rows, delta, None, weight, None, 1e-5, "layer", backend="cpu")
            act = ops.gated_act(out.flatten(0, 1), None, "gelu", backend="cpu")
            logits = ops.answer_logits(rows, None, weight, None, 1e-5, "rms", make(8, 2, 257), backend="cpu")
            results.append((rows, out, act, logits))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_autograd_notices_the_change_of_a_saved_tensor(backend):
    row, factor = make(1, 2, 5), torch.ones(5, requires_grad=True)
    product = (row * factor).sum()  # keeps row for the gradient
    ops.add_norm(row, None, make(2, 5), torch.ones(5), None, 1e-5, "rms", backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_auto_takes_the_kernel_and_steps_down():
    for op in OPS:
        expected = "reference" if op in WITHOUT_CPU else "cpu"
        assert ops.backend_of(op, "cpu", torch.float32) == expected, ops.report()
        assert ops.backend_of(op, torch.device("cuda", 0), torch.float64) == "reference"
        assert ops.backend_of(op, "mps") == "reference"
    assert ops.backend_of("add_norm", "cpu", torch.bfloat16) == "cpu"
    assert ops.backend_of("gated_act", "cpu", torch.float16) == "reference"


def test_by_name_runs_or_says_why():
    gate = make(2, 3, dtype=torch.float64)
    with pytest.raises(
        BackendError, match=r"gated_act: backend 'cpu' cannot run on cpu in torch.float64: the C\+\+ kernels"
    ):
        ops.gated_act(gate, backend="cpu")
    with pytest.raises(BackendError, match="gated_act has no triton implementation"):
        ops.gated_act(gate, backend="triton")
    with pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        ops.add_norm(make(1, 1, 3), None, None, make(3), None, 1e-5, "rms", backend="cuda")
    with pytest.raises(InputError, match="backend: expected one of auto, cpu, cuda, triton, reference; got 'gpu'"):
        ops.gated_act(gate, backend="gpu")
    with pytest.raises(InputError, match=r"op: expected one of ablate_heads, add_norm, .*; got 'norm_add'"):
        ops.backend_of("norm_add")


def test_report_gives_a_reason_for_every_refusal():
    rows = ops.report()
    assert [(row.op, row.backend) for row in rows] == [(op, name) for op in OPS for name in _registry.NAMES]
    assert all(row.available == (row.reason is None) for row in rows)
    for op in OPS:
        assert ops.why_not(op, "reference", torch.device("cpu"), torch.float64) is None
    if not torch.cuda.is_available():
        reason = ops.why_not("add_norm", "cuda", torch.device("cuda"), torch.float32)
        assert "CUDA" in reason


def test_a_missing_extension_is_a_reason_not_a_crash(monkeypatch):
    from pyarith.ops import _native

    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "_load_error", "not built")
    monkeypatch.setattr(_registry, "_chosen", {})
    assert ops.backend_of("gated_act") == "reference"
    assert ops.gated_act(make(2, 3)).shape == (2, 3)
    with pytest.raises(BackendError, match="not built"):
        ops.gated_act(make(2, 3), backend="cpu")
    assert ops.native_info() == {"built": False, "reason": "not built"}


def test_the_extension_repeats_what_memory_safety_needs():
    # called past the contract, with arguments that would read or write out of bounds
    from pyarith import _C

    row, weight = make(2, 3, 8), make(8)
    for changed, words in (
        (dict(out=torch.empty(2, 3, 4)), "out: expected another shape"),
        (dict(out=torch.empty(2, 3, 8, dtype=torch.float64)), "out: expected a dtype that this kernel reads"),
        (dict(row=make(3, 2, 8).transpose(0, 1)), "row: expected a contiguous tensor"),
        (dict(weight=torch.empty(8, device="meta")), "weight: expected a CPU tensor"),
        (dict(weight=None), "weight and out: expected tensors, not None"),
        (dict(weight="a string"), "incompatible function arguments"),
        (dict(kind="none"), "kind: expected rms, rms1p or layer"),
    ):
        known = dict(
            row=row,
            delta=None,
            write=None,
            weight=weight,
            bias=None,
            out=torch.empty(2, 3, 8),
            eps=0.0,
            kind="rms",
            threads=1,
        )
        with pytest.raises((ValueError, TypeError, RuntimeError, BufferError)) as caught:
            _C.add_norm_cpu(**(known | changed))
        assert words in str(caught.value) or changed.keys() == {"weight"}, caught.value


def python(*arguments, **environment):
    """Run a fresh interpreter that can import the test helpers, too."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level_against_fp64_and_guard_pages(level):
    """Numbers and memory bounds at each instruction set this machine has (guard_check.py), one process each."""
    supported = ops.native_info()["cpu_supported"]
    if LEVELS.index(level) > LEVELS.index(supported):
        pytest.skip(f"this processor has {supported}, not {level}")
    done = python(Path(__file__).with_name("guard_check.py"), PYARITH_CPU=level)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"exit {done.returncode} in: {last}\n{done.stderr[-2000:]}"
    assert last == f"done at {level}"


def test_an_unknown_cpu_level_is_refused():
    done = python("-c", "import pyarith.ops", PYARITH_CPU="sse9")
    assert "PYARITH_CPU: expected one of base, avx2, avx512; got 'sse9'" in done.stderr


def test_a_forked_child_does_not_hang():
    code = """
import os, torch
from pyarith import ops
torch.set_num_threads(2)
gate = torch.randn(512, 512)
expected = ops.gated_act(gate, backend="cpu")  # opens a parallel region
child = os.fork()
if child == 0:
    # compared by numpy: torch's own comparison would open a parallel region, and hang
    os._exit(0 if (ops.gated_act(gate, backend="cpu").numpy() == expected.numpy()).all() else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    assert python("-c", code).returncode == 0
