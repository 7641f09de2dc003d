"""A prefix that all prompts share: what the captures cost against that prefix once plus the suffixes without it."""

import statistics
from typing import Any

import torch
from case_speed import run_fast_patch, sender_logits, spot_check
from harness import Record, Row, Timing, time_rounds
from workloads import Workload, build_inputs, build_model


def capture_seconds(result: Any) -> float:
    """Seconds that a result's own clock gives to the captures."""
    return float(result.settings["seconds"]["capture"])


def run(record: Record, workload: Workload, rounds: int) -> None:
    """Rows for the captures, for the reference of clean and corrupted suffixes, and for one set of suffixes."""
    model, inputs = build_model(workload), build_inputs(workload)
    prefix = inputs["clean"][:1, : workload.prefix]
    suffixes = {name: inputs[name][:, workload.prefix :] for name in ("clean", "corrupted")}

    @torch.no_grad()
    def decode(ids: torch.Tensor) -> None:
        model.model(input_ids=ids, use_cache=False)

    results: list[Any] = []
    calls = {
        "fast_patch": lambda: results.append(run_fast_patch(model, inputs)),
        "prefix": lambda: decode(prefix),
        "clean suffixes": lambda: decode(suffixes["clean"]),
        "corrupted suffixes": lambda: decode(suffixes["corrupted"]),
    }
    samples = time_rounds(calls, rounds)
    check = spot_check(model, inputs, workload, sender_logits(results[-1]))
    captures = [capture_seconds(result) for result in results[-rounds:]]
    totals = list(zip(samples["prefix"], samples["clean suffixes"], samples["corrupted suffixes"], strict=True))
    pairs, single = [sum(parts) for parts in totals], [parts[0] + parts[1] for parts in totals]
    common = {"name": workload.name, "shape": workload.shape, "dtype": workload.dtype, "check": check}
    record.write(Row(**common, provider="prefix + clean and corrupted suffixes", seconds=Timing.of(pairs)))
    record.write(Row(**common, provider="prefix + clean suffixes", seconds=Timing.of(single)))
    median = statistics.median(captures)
    record.write(
        Row(
            **common,
            provider="fast_patch captures",
            seconds=Timing.of(captures),
            extra={
                "over_prefix_and_pair_suffixes": median / statistics.median(pairs),
                "over_prefix_and_clean_suffixes": median / statistics.median(single),
                "total_seconds": statistics.median(samples["fast_patch"]),
                "settings": results[-1].settings,
            },
        )
    )
