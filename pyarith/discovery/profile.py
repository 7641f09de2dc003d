"""``profile_patch``: where the time and memory of a ``fast_patch`` go, beside what was forecast."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyarith.discovery.patching import fast_patch
from pyarith.engine import oracle
from pyarith.engine.phases import listening
from pyarith.engine.planner import default_budget, gemm_rate, parse_bytes
from pyarith.engine.profiling import OUTSIDE, Account, HighWater, PhaseTimes, Roofline, TraceMarks
from pyarith.errors import InputTypeError, check
from pyarith.models.sites import resolve
from pyarith.models.streaming import opened
from pyarith.prompts import PromptPairs
from pyarith.result import PatchResult

_FORECAST = ("self-check", "verify")  # phases that a forecast leaves out


@dataclass(frozen=True)
class Cost:
    """What a phase, or an op in a phase, takes.

    Attributes:
        phase: "self-check", "prefix", "capture", "replay", "readout", "verify", or "other" for what lies between.
        op: name with its namespace, "" for a whole phase.
        calls: of the op; 0 for a phase.
        seconds: of a phase in a run of its own, in which nothing is counted; of an op while ops are counted.
        flop: of matrix products and attention; element-wise work is 0.
        bytes: each input of an op read once, each result written once.
        roofline: share of what this machine can do: seconds that ``flop`` and ``bytes`` take at the measured rates
            (the longer of the two for an op, summed over the ops for a phase) over ``seconds``. Above 1 where data stay
            in a cache.
    """

    phase: str
    op: str
    calls: int
    seconds: float
    flop: float
    bytes: float
    roofline: float


@dataclass(frozen=True)
class PatchProfile:
    """What ``profile_patch`` found.

    Attributes:
        result: of the run that was timed, as ``fast_patch`` gives it.
        phases: in the order of the run.
        ops: longest first.
        seconds: of the timed run, and of the one in which every op was counted.
        unchanged: whether both runs gave the same bits.
        high_water: tensors beyond the model at the moment of most memory, and what they were for.
        allocator_bytes: peak of CUDA's allocator beyond what was held before; None on other devices.
        forecast: FLOP, bytes and seconds by the planner.
        roofline: rates measured in this run.
    """

    result: PatchResult
    phases: tuple[Cost, ...]
    ops: tuple[Cost, ...]
    seconds: dict[str, float]
    unchanged: bool
    high_water: HighWater
    allocator_bytes: int | None
    forecast: dict[str, float]
    roofline: Roofline

    @property
    def compared(self) -> dict[str, tuple[float, float]]:
        """Quantity -> (forecast, found); seconds without the self-check and the verification."""
        flop = {name: sum(p.flop for p in self.phases if p.phase in parts) for name, parts in _PARTS.items()}
        took = sum(p.seconds for p in self.phases if p.phase not in _FORECAST)
        return {
            "capture FLOP": (self.forecast["capture_flop"], flop["capture"]),
            "replay FLOP": (self.forecast["replay_flop"], flop["replay"]),
            "bytes beyond the model": (self.forecast["bytes"], float(self.high_water.bytes)),
            "seconds": (self.forecast["seconds"], took),
        }

    def record(self) -> dict[str, Any]:
        """Everything but the result, as JSON holds it."""
        settings = self.result.settings
        return {
            "model": {name: settings[name] for name in ("model", "family", "n_layers", "n_heads", "dtype", "device")},
            "prompts": len(self.result.clean_logits),
            "settings": settings,
            "seconds": self.seconds,
            "unchanged": self.unchanged,
            "roofline": asdict(self.roofline),
            "phases": [asdict(cost) for cost in self.phases],
            "ops": [asdict(cost) for cost in self.ops],
            "high_water": asdict(self.high_water),
            "allocator_bytes": self.allocator_bytes,
            "compared": {name: {"forecast": a, "found": b} for name, (a, b) in self.compared.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Write ``record()`` as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.record(), indent=1, default=str) + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        lines = [f"{len(self.result.clean_logits)} prompts in {self.seconds['timed']:.3f} s"]
        lines += [
            f"  {p.phase:10} {p.seconds:9.4f} s {p.flop / 1e9:10.1f} GFLOP {p.bytes / 2**20:9.0f} MiB moved "
            f"{p.roofline:6.1%} of the roofline"
            for p in self.phases
        ]
        lines += [f"  {name}: forecast {a:.4g}, found {b:.4g}" for name, (a, b) in self.compared.items()]
        return "\n".join(lines)


_PARTS = {"capture": ("prefix", "capture"), "replay": ("replay",)}


def profile_patch(
    model: Any,
    clean: Any,
    corrupted: Any = None,
    answers: Any = None,
    *,
    trace: str | Path | None = None,
    **options: Any,
) -> PatchProfile:
    """Run ``fast_patch`` to see where its time and memory go; the numbers it gives are those of a plain run.

    Two runs (three with ``trace``): one in which torch's dispatcher counts every op, its FLOP and bytes and the tensors
    alive, which slows it down; then one in which only the phases are timed. Both have the same blocks, so that they
    give the same bits; ``unchanged`` says whether they did. The rates of the roofline are measured in between.

    Args:
        model, clean, corrupted, answers, options: as for ``fast_patch``; one batch.
        trace: where to write a Chrome trace (chrome://tracing, Perfetto) of a further run by torch.profiler.

    Returns:
        A ``PatchProfile``. On a GPU the phases of every run are NVTX ranges for Nsight, too.

    Raises:
        InputTypeError: ``clean`` is an iterable of batches.
        Whatever ``fast_patch`` raises.

    Examples:
        >>> import pyarith as pa
        >>> model, tokenizer = pa.load_demo()
        >>> pairs = pa.tasks.arithmetic(tokenizer, "+", n=8)
        >>> profile = pa.profile_patch(model, pairs, verify=0)
        >>> [cost.phase for cost in profile.phases]
        ['self-check', 'capture', 'replay', 'readout', 'other']
    """
    check(
        isinstance(clean, torch.Tensor | np.ndarray | PromptPairs | Mapping) or corrupted is not None,
        f"clean: expected one batch (a tensor beside the others, or PromptPairs), got {type(clean).__name__}; profile "
        "one batch at a time",
        InputTypeError,
    )
    model = opened(model)
    sites = resolve(model, spread=True)
    budget = parse_bytes(options.pop("memory_budget", None))
    # what is free changes from run to run, and the blocks with it
    options["memory_budget"] = default_budget(sites.device) if budget is None else budget
    options.setdefault("progress", False)

    def run(*listeners: Any, mode: AbstractContextManager[Any] | None = None) -> tuple[PatchResult, float]:
        oracle.forget(sites.model)  # a first run checks the model, and that is part of its time
        begin = time.perf_counter()
        with listening(*listeners), mode or nullcontext():
            result = fast_patch(model, clean, corrupted, answers, **options)
        if sites.device.type == "cuda":
            torch.cuda.synchronize(sites.device)
        return result, time.perf_counter() - begin

    gemm_rate(sites.device, sites.dtype)  # measured once for all runs, and part of none
    account, times = Account(sites.device), PhaseTimes(sites.device)
    counted, slow = run(account, mode=account)
    account.settle()
    roofline = Roofline.measure(sites.device, sites.dtype)
    before = _allocated(sites.device)
    result, took = run(times)
    peak = None if before is None else torch.cuda.max_memory_allocated(sites.device) - before
    if trace is not None:
        _write_trace(Path(trace), sites.device, run)
    seconds = {name: found for name, found in times.seconds().items() if any(name == p for p, _ in account.totals)}
    seconds[OUTSIDE] = max(0.0, took - sum(seconds.values()))
    ops = [
        Cost(phase, op, t.calls, t.seconds, t.flop, t.bytes, _share(roofline.ceiling(t.flop, t.bytes), t.seconds))
        for (phase, op), t in account.totals.items()
    ]
    return PatchProfile(
        result=result,
        phases=tuple(_phase(name, took, ops, roofline) for name, took in seconds.items()),
        ops=tuple(sorted(ops, key=lambda cost: -cost.seconds)),
        seconds={"timed": took, "counted": slow},
        unchanged=_same(counted, result),
        high_water=account.high_water,
        allocator_bytes=peak,
        forecast=dict(result.settings["forecast"]),
        roofline=roofline,
    )


def _share(least: float, took: float) -> float:
    return least / took if took else 0.0


def _phase(name: str, took: float, ops: list[Cost], roofline: Roofline) -> Cost:
    own = [cost for cost in ops if cost.phase == name]
    least = sum(roofline.ceiling(cost.flop, cost.bytes) for cost in own)
    return Cost(name, "", 0, took, sum(c.flop for c in own), sum(c.bytes for c in own), _share(least, took))


def _same(one: PatchResult, other: PatchResult) -> bool:
    """Whether two results hold the same bits."""
    pairs = ((one.head_logits, other.head_logits), (one.mlp_logits, other.mlp_logits))
    return all(a is b or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True)) for a, b in pairs)


def _allocated(device: torch.device) -> int | None:
    """Bytes that CUDA's allocator has given out, its peak counted from here on; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _write_trace(path: Path, device: torch.device, run: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, record_shapes=True) as profiler:
        run(TraceMarks())
    profiler.export_chrome_trace(str(path))
