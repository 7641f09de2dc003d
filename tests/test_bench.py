"""The benchmark harness writes complete rows, refuses unchecked ones, and its baselines agree with each other."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def row(check):
    from harness import Row, Timing

    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    return Row(name="op", provider="torch", shape={"rows": 2}, dtype="float32", check=check, seconds=timing, flop=8.0)


def test_row_is_one_json_line_with_environment(tmp_path):
    from harness import Check, Record

    record = Record(tmp_path / "results" / "rows.jsonl")
    for _ in range(2):
        record.write(row(Check("fp64", 1e-7, 1e-6)))
    lines = (tmp_path / "results" / "rows.jsonl").read_text().splitlines()
    written = json.loads(lines[0])
    assert len(lines) == 2
    assert written["check"] == {"oracle": "fp64", "error": 1e-7, "bound": 1e-6}
    assert written["seconds"] == {"median": 3.0, "p20": pytest.approx(1.8), "p80": pytest.approx(4.2), "rounds": 5}
    assert {"commit", "dirty", "versions", "hardware", "time", "quick"} <= written.keys()
    assert written["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads", "memory_bytes", "isa"} <= written["hardware"].keys()


@pytest.mark.parametrize("error", [2e-6, float("nan"), float("inf")])
def test_row_without_passed_check_is_refused(error):
    from harness import Check

    with pytest.raises(ValueError, match="no passed check"):
        row(Check("fp64", error, 1e-6))


def test_row_without_check_is_refused():
    with pytest.raises(TypeError, match="expected a Check"):
        row(None)


def test_rounds_interleave():
    from harness import time_rounds

    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_rounds(calls, rounds=3, warmup=0)
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 3 for values in samples.values())


def test_peak_memory_sees_what_was_freed():
    from memory import PeakMemory

    with PeakMemory() as memory:
        block = torch.ones(48 * 2**18)
        del block
    # not twice; what other threads of the test process allocate meanwhile is in it too
    assert 47 * 2**20 <= memory.resident_bytes < 90 * 2**20
    assert 32 * 2**20 <= memory.private_bytes < 90 * 2**20  # sampled: the last millisecond may be missing


def test_floor_has_the_flop_of_its_formula():
    from floor import Floor
    from workloads import FULL, build_model, quick

    work = FULL["llama12x12"]
    forward = 24 * 12 * (8 * 768**2 + 6 * 768 * 2048)
    replay = (12 * 78 + 66) * 6 * 768 * 2048
    assert work.flop == 8 * (2 * forward + replay)
    small = quick(work)
    with FlopCounterMode(display=False) as counter:
        floor = Floor(small, build_model(small))
        floor.capture()
        floor.replay()
    assert counter.get_total_flops() == small.flop


def test_literal_baselines_agree_at_any_number_of_heads_per_forward():
    from baselines import HookPatching, available_peers
    from harness import relative_error
    from workloads import FULL, all_senders, build_inputs, build_model, quick

    work = quick(FULL["small8x8"])
    model, inputs, senders = build_model(work), build_inputs(work), all_senders(work)
    hooks = HookPatching(model, **inputs)
    logits = hooks.run(senders)
    assert relative_error(logits, hooks.clean_logits.expand_as(logits)) > 1e-2
    assert relative_error(hooks.run(senders, 4), logits) < 5e-6
    for peer in available_peers()[0].values():
        literal = peer(model, **inputs)
        for heads_per_forward in (1, 4):
            assert relative_error(literal.run(senders, heads_per_forward), logits) < 5e-6
