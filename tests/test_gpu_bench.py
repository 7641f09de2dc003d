"""bench/gpu.py without a GPU: its refusal, the rehearsal of all stages, and what it does with kernels that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from single_thread import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "bench" / "gpu.py")]
# what a bare GPU machine has not got
ABSENT = ("scipy", "matplotlib", "hypothesis", "typer", "rich", "transformer_lens", "nnsight")

WRONG_KERNELS = """
import dataclasses, os, sys, time
sys.path.insert(0, {root!r})
from pyarith.ops import _registry as registry

def plant(op, backend, function):
    registry._table[op][backend] = dataclasses.replace(registry._table[op][backend], function=function)

right = registry._table["gated_act"]["cpu"].function

def one_element(gate, up, out, act):
    right(gate, up, out, act)
    out[(-1,) * out.dim()] += 0.5

plant("gated_act", "cpu", one_element)
attention = registry._table["shared_prefix_attention"]["reference"].function

def crash(q, *rest):
    if str(q.dtype) == "torch.float32":
        os.abort()
    attention(q, *rest)

plant("shared_prefix_attention", "reference", crash)
add = registry._table["add_norm"]["cpu"].function

def hang(*given):
    hung = os.path.join(os.path.dirname(__file__), "hung")  # once is enough: a later stage uses the kernel, too
    if any(str(getattr(one, "dtype", "")) == "torch.bfloat16" for one in given) and not os.path.exists(hung):
        open(hung, "w").close()
        time.sleep(1000)
    add(*given)

plant("add_norm", "cpu", hang)
"""


def start(*arguments: str, folder: Path, custom: str = "", **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own; `custom` runs at the start of it and of every process that it starts."""
    (folder / "sitecustomize.py").write_text(custom)
    known = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=280)
    return process.returncode, output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends(tmp_path):
    begin = time.perf_counter()
    status, output = finish(start("--out", str(tmp_path / "rows.jsonl"), folder=tmp_path))
    assert status == 2
    assert output.startswith("no GPU: torch ") and output.endswith("; nothing was checked\n")
    assert output.count("\n") == 1 and torch.__version__ in output
    assert not (tmp_path / "rows.jsonl").exists()
    assert time.perf_counter() - begin < 30


@pytest.mark.timeout(300)
def test_rehearsal_runs_every_stage_and_needs_no_optional_package(tmp_path):
    changed = subprocess.run(["git", "status", "--porcelain", "bench"], cwd=ROOT, capture_output=True, text=True).stdout
    custom = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    out = tmp_path / "results" / "rows.jsonl"
    status, output = finish(start("--rehearse", "--seed", "7", "--out", str(out), folder=tmp_path, custom=custom))
    assert status == 0, output
    assert output.startswith("seed 7\n")
    written = rows(out)
    from_stages = {
        "kernels": {
            "check add_norm",
            "check gated_act",
            "check answer_logits",
            "check head_write_rows",
            "check slice_grad",
            "check masked_adamw",
        },
        "engine": {"check fast_patch", "check tuning"},
        "ceilings": {"copy", "gemm up", "gemm down", "gemm square"},
        "ops": {
            "add_norm",
            "vocab_logsumexp",
            "ablate_heads",
            "shared_prefix_attention",
            "slice_grad",
            "masked_adamw",
            "gate_up",
        },
        "tuning": {"tuning llama2-7b", "tuning llama2-7b, memory", "tuning llama2-7b, update"},
        "fast_patch": {"llama2-7b, 16 tokens", "llama2-7b, 64 tokens"},
        "more": {"llama3-8b, 16 tokens"},
    }
    names = {row["name"] for row in written}
    for stage, expected in from_stages.items():
        assert f"\n{stage}: " in output, stage
        assert expected <= names, stage
    assert "\nbuild: " in output
    assert all(row["check"]["error"] <= row["check"]["bound"] and row["quick"] for row in written)
    assert {row["provider"] for row in written} >= {"fast_patch", "hooks@1", "hooks@8", "row block 16384"}
    assert output.endswith(f"record: {out}\n")
    assert (
        subprocess.run(["git", "status", "--porcelain", "bench"], cwd=ROOT, capture_output=True, text=True).stdout
        == changed
    )


@pytest.mark.timeout(200)
def test_ended_by_a_signal_it_keeps_what_it_has(tmp_path):
    out = tmp_path / "rows.jsonl"
    process = start("--rehearse", "--out", str(out), folder=tmp_path)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("check gated_act"):
            break
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM
    assert {row["name"] for row in rows(out)} >= {"check add_norm", "check gated_act"}
    table = output[output.index("stage ") :]
    assert "passed" in table and "not measured: ended by SIGTERM" in table
    assert table.endswith(f"record: {out}\n")


@pytest.mark.timeout(200)
def test_without_time_nothing_is_measured_and_all_is_listed(tmp_path):
    out = tmp_path / "rows.jsonl"
    status, output = finish(start("--rehearse", "--minutes", "0", "--out", str(out), folder=tmp_path))
    assert status == 1  # nothing was checked, and success would say the opposite
    table = output[output.index("stage ") :]
    for case in ("build", "check add_norm cpu float32", "fast_patch gemma2 auto bfloat16", "copy"):
        assert any(case in line and "out of time" in line for line in table.splitlines()), case
    assert not re.search(r"\d passed", table)
    assert not out.exists() and table.endswith("record: no row was written\n")


@pytest.fixture
def bench_on_path(monkeypatch):
    for folder in ("tests/ops", "tests", "bench"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.mark.timeout(300)
def test_kernels_that_are_wrong_crash_or_hang_are_reported_and_the_rest_goes_on(
    tmp_path, bench_on_path, monkeypatch, capfd
):
    import gpu
    from gpu_report import STAGES, Stage

    (tmp_path / "sitecustomize.py").write_text(WRONG_KERNELS.format(root=str(ROOT)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(STAGES, "kernels", Stage("kernels", "kernels", seconds=150, hangs=3, checks=True))
    monkeypatch.setitem(STAGES, "engine", Stage("engine", "engine", seconds=3, hangs=40, checks=True))
    out = tmp_path / "rows.jsonl"
    supervisor = gpu.Supervisor(gpu.Options(rehearse=True, quick=True, out=out))
    supervisor.run()
    output = capfd.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert f"  check gated_act cpu {dtype}: FAILED: ValueError: gated_act cpu" in output
    assert "  check shared_prefix_attention reference float32: FAILED: the process died of SIGABRT" in output
    found = {(row["name"], row["provider"], row["dtype"]) for row in rows(out)}
    assert not [row for row in found if row[:2] == ("check gated_act", "cpu")]
    assert ("check shared_prefix_attention", "reference", "float32") not in found
    assert ("check shared_prefix_attention", "reference", "float16") in found
    assert ("check gated_act", "reference", "float32") in found  # same op, another backend
    assert ("check vocab_logsumexp", "cpu", "float32") in found  # behind the crash
    assert "check fast_patch" in {name for name, _, _ in found}
    outcomes = supervisor.report.outcomes
    assert outcomes["check add_norm cpu bfloat16"].reason == "no end in 3 s"
    assert outcomes["check add_norm cpu float32"].status == "passed"
    assert outcomes["out of memory"].reason == "out of time"
    assert outcomes["build"].status == "passed" and not supervisor.report.all_well


def broken_problem(**changed):
    """A problem of tests/ops whose op is wrong in one way; the check must see it."""
    from gpu_problems import Draw, gated_act

    problem = gated_act(Draw(torch.Generator().manual_seed(0)), torch.float32, 5, 17)
    return problem.__class__(**{**vars(problem), **changed})


class Recorder:
    """Stands for the connection to the supervisor."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def recv(self):
        return ""


@pytest.fixture
def bench(bench_on_path, tmp_path):
    from gpu_work import Bench, Options

    return Bench(Options(rehearse=True, seed=1, out=tmp_path / "rows.jsonl"), {}, Recorder())


def test_a_check_sees_wrong_unwritten_and_unrepeatable_results(bench):
    from gpu_checks import against_fp64, same_bits

    from pyarith import ops

    def right(t, backend):
        ops.gated_act(t["gate"], t["up"], "silu", out=t["out"], backend=backend)

    def unwritten(t, backend):
        ops.gated_act(t["gate"][:-1], t["up"][:-1], "silu", out=t["out"][:-1], backend=backend)

    def moving(t, backend):
        right(t, backend)
        t["out"] += 1e-7 * torch.rand(())

    def aligned_only(t, backend):
        right(t, backend)
        if t["gate"].data_ptr() % 16:
            t["out"] *= 1.001

    against_fp64(broken_problem(run=right), "cpu", "right")
    same_bits(bench, broken_problem(run=right), "cpu", "right")
    for wrong in (unwritten, aligned_only):
        with pytest.raises(ValueError, match="no passed check"):
            against_fp64(broken_problem(run=wrong), "cpu", "wrong")
    with pytest.raises(ValueError, match="differs from the first run"):
        same_bits(bench, broken_problem(run=moving), "cpu", "moving")


@pytest.mark.parametrize("call, how", [(2, "a second run"), (3, "another stream"), (4, "a replayed graph")])
def test_a_check_says_which_run_differs(call, how, bench):
    from gpu_checks import same_bits

    from pyarith import ops

    calls = []

    def changing(t, backend):
        ops.gated_act(t["gate"], t["up"], "silu", out=t["out"], backend=backend)
        calls.append(how)
        if len(calls) == call:
            t["out"][0, 0] += 1e-6

    with pytest.raises(ValueError, match=f"out of {how} differs"):
        same_bits(bench, broken_problem(run=changing), "cpu", "changing")


@pytest.mark.parametrize("call, how", [(2, "a second run"), (4, "a replayed graph")])
def test_a_replay_that_changes_is_seen(call, how, bench, monkeypatch):
    import gpu_engine_checks

    real, calls = gpu_engine_checks.Prepared.run, []

    def changing(self, row_block):
        calls.append(row_block)
        return real(self, row_block) + 1e-6 * (len(calls) == call)

    gpu_engine_checks.replay(bench, torch.float32)
    monkeypatch.setattr(gpu_engine_checks.Prepared, "run", changing)
    with pytest.raises(ValueError, match=f"replay, {how}: differs"):
        gpu_engine_checks.replay(bench, torch.float32)


def test_blocks_that_are_not_halved_are_seen(bench, monkeypatch):
    from contextlib import nullcontext

    import gpu_engine_checks

    gpu_engine_checks.out_of_memory(bench)
    monkeypatch.setattr(gpu_engine_checks, "little_memory", nullcontext)
    with pytest.raises(ValueError, match="blocks were not halved"):
        gpu_engine_checks.out_of_memory(bench)


def test_an_op_without_problems_is_a_finding(bench):
    from gpu_checks import problems

    with pytest.raises(NotImplementedError, match="would go unchecked"):
        list(problems("new_op", True))


def test_no_measurement_without_a_passed_check(bench):
    from gpu_ops import cases
    from gpu_work import Case, _run

    named = {case.name: case for case in cases(bench)}
    assert _run(bench, named["time gated_act"])
    outcome = bench.outcomes["time gated_act"]
    assert (outcome.status, outcome.reason) == ("not measured", "the checks of gated_act did not pass")
    assert _run(bench, Case("more", "late", lambda _: None, needs=("time gated_act",)))
    assert bench.outcomes["late"].reason == "time gated_act: not passed"
    assert not bench.path.exists()


@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_engine_checks_see_one_wrong_sender(kind, bench, monkeypatch):
    import gpu_engine_checks
    from gpu_work import _run

    named = {case.name: case for case in gpu_engine_checks.cases(bench)}
    real = gpu_engine_checks.patch

    def wrong(*arguments, **options):
        result = real(*arguments, **options)
        getattr(result, f"{kind}_logits")[-1] *= 1.05
        return result

    case = named["fast_patch llama auto float32"]
    assert _run(bench, case) and bench.outcomes.pop(case.name).status == "passed"
    monkeypatch.setattr(gpu_engine_checks, "patch", wrong)
    assert _run(bench, case) and bench.outcomes[case.name].status == "FAILED"
    assert "no passed check" in bench.outcomes[case.name].reason


def test_heads_in_the_wrong_place_are_not_timed(bench, monkeypatch):
    import gpu_engine
    import numpy as np
    from gpu_report import Outcome
    from gpu_work import _run

    real = gpu_engine.patch

    def rolled(*arguments, **options):
        result = real(*arguments, **options)
        result.head_logits[:] = np.roll(result.head_logits, 1, axis=1)
        return result

    bench.outcomes |= {name: Outcome("engine", name, "passed") for name in gpu_engine.NEEDED}
    case = next(case for case in gpu_engine.cases() if case.name == "llama2-7b, 64 tokens")
    monkeypatch.setattr(gpu_engine, "patch", rolled)
    assert _run(bench, case) and bench.outcomes[case.name].status == "FAILED"
    assert "no passed check" in bench.outcomes[case.name].reason
    assert not bench.path.exists()


def one_row_off(left, right, out, left_ranges=None, right_ranges=None):
    """A gradient whose rows belong to the next weights."""
    from pyarith import ops

    moved = left_ranges and tuple((start - 1, stop - 1) if start else (start, stop) for start, stop in left_ranges)
    return ops.slice_grad(left, right, out, moved, right_ranges)


def test_wrong_gradients_of_slices_are_seen(bench, monkeypatch):
    import gpu_tuning

    from pyarith.tuning import linear

    monkeypatch.setattr(linear, "ops", SimpleNamespace(slice_grad=one_row_off))
    with pytest.raises(ValueError, match="gradients of slices in fp32 has no passed check"):
        gpu_tuning.check(bench)


@pytest.mark.parametrize(
    "wrong, message", [("decay", "updates of slices has no passed"), ("frozen", "neither as before")]
)
def test_wrong_updates_are_seen(wrong, message, bench, monkeypatch):
    import gpu_tuning

    from pyarith.tuning.optimizer import SliceAdamW

    right = SliceAdamW.step

    def step(self, closure=None):
        right(self, closure)
        model = self._tuner.model
        if wrong == "frozen":
            model.lm_head.weight.data[0, 0] += 1
            return
        with torch.no_grad():
            for value in self._tuner.parameters():
                value.mul_(0.9999)
        self._tuner.sync()

    monkeypatch.setattr(SliceAdamW, "step", step)
    with pytest.raises(ValueError, match=message):
        gpu_tuning.check(bench)
    assert not any(row["provider"] == "updates" for row in rows(bench.path))
