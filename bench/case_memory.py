"""Peak private memory of `fast_patch` under budgets, and what a budget costs in time."""

import multiprocessing
import statistics
from typing import Any

import numpy
import torch
from case_speed import run_fast_patch, sender_logits, spot_check
from harness import Record, Row, Timing, time_rounds
from memory import PeakMemory
from workloads import Workload, build_inputs, build_model

MIB = 2**20
BUDGETS: dict[str, int | None] = {"64 MiB": 64 * MIB, "128 MiB": 128 * MIB, "256 MiB": 256 * MIB, "unlimited": None}
ALLOWED_ABOVE = 32 * MIB
WARM_PROMPTS = 2


def measure(workload: Workload, budget: int | None) -> tuple[int, int, numpy.ndarray]:
    """(private peak, resident peak, patched logits) of one call; the process is warmed up on the first prompts."""
    model, inputs = build_model(workload), build_inputs(workload)
    warm = {name: value[:WARM_PROMPTS] for name, value in inputs.items()}
    run_fast_patch(model, warm, memory_budget=budget)
    with PeakMemory() as memory:
        result = run_fast_patch(model, inputs, memory_budget=budget)
    return memory.private_bytes, memory.resident_bytes, sender_logits(result).numpy()


def run(record: Record, workload: Workload, rounds: int) -> None:
    """Memory in a new process per budget, then times of all budgets in interleaved rounds of this one."""
    peaks = {name: _in_new_process(workload, budget) for name, budget in BUDGETS.items()}
    model, inputs = build_model(workload), build_inputs(workload)
    results: dict[str, Any] = {}

    def call(name: str) -> None:
        results[name] = run_fast_patch(model, inputs, memory_budget=BUDGETS[name])

    samples = time_rounds({name: lambda name=name: call(name) for name in BUDGETS}, rounds)
    unlimited = statistics.median(samples["unlimited"])
    for name, budget in BUDGETS.items():
        private, resident, logits = peaks[name]
        checks = [spot_check(model, inputs, workload, torch.as_tensor(logits))]
        checks.append(spot_check(model, inputs, workload, sender_logits(results[name])))
        extra = {
            "budget_bytes": budget,
            "resident_peak_bytes": resident,
            "over_unlimited_time": statistics.median(samples[name]) / unlimited,
            "settings": results[name].settings,
        }
        if budget is not None:
            extra["within_budget"] = private <= budget + ALLOWED_ABOVE
        record.write(
            Row(
                name=workload.name,
                provider=f"fast_patch {name}",
                shape=workload.shape,
                dtype=workload.dtype,
                check=max(checks, key=lambda check: check.error),
                seconds=Timing.of(samples[name]),
                flop=workload.flop,
                bytes=workload.bytes,
                peak_private_bytes=private,
                extra=extra,
            )
        )


def _in_new_process(workload: Workload, budget: int | None) -> tuple[int, int, numpy.ndarray]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (workload, budget))
