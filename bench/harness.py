"""Timing, records and checks that every benchmark of pyarith shares.

A figure enters a record only through `Row`, and a `Row` exists only with a `Check` that passed: a fast wrong answer
cannot be written. Competitors are timed in interleaved rounds of one process (`time_rounds`), so that a slow minute of
the machine hits all of them alike; ratios are taken between medians of the same run. Records are JSON lines.
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
PACKAGES = ("torch", "transformers", "numpy", "triton", "transformer_lens", "nnsight")


@dataclass(frozen=True)
class Check:
    """What was compared before the clock started: `error` of this result against `oracle`, allowed up to `bound`."""

    oracle: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.bound

    def require(self, what: str) -> "Check":
        """Itself where it passed; otherwise an error that names `what` was checked, before anything is timed."""
        if not self.passed:
            raise ValueError(
                f"{what} has no passed check: error {self.error:.3g} against {self.oracle}, allowed {self.bound:.3g}"
            )
        return self


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20 and 80 percentile of `rounds` calls."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), cuts[0], cuts[3], len(samples))

    def scaled(self, factor: float) -> "Timing":
        return Timing(self.median * factor, self.p20 * factor, self.p80 * factor, self.rounds)


@dataclass(frozen=True)
class Row:
    """One benchmark result. `flop` and `bytes` are the model of the work, not a measurement.

    `share_of_roofline` is the ceiling's time for that work divided by the median, both measured in one run.
    """

    name: str
    provider: str
    shape: Mapping[str, Any]
    dtype: str
    check: Check
    seconds: Timing | None = None
    flop: float | None = None
    bytes: float | None = None
    share_of_roofline: float | None = None
    peak_private_bytes: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.check, Check):
            raise TypeError(f"row {self.name!r} ({self.provider}): expected a Check, got {self.check!r}")
        self.check.require(f"row {self.name!r} ({self.provider})")


class Record:
    """Collects rows and appends each to a JSON-lines file at once, together with the environment of the run."""

    def __init__(self, path: Path, quick: bool = False) -> None:
        self.path = Path(path)
        self.environment = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "quick": quick, **environment()}

    def write(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**asdict(row), **self.environment}, default=_plain) + "\n")
        print(_summary(row), flush=True)


def _plain(value: Any) -> Any:
    """Numpy and torch scalars as numbers, everything else that JSON does not know by its name."""
    return value.item() if hasattr(value, "item") else str(value)


def _summary(row: Row) -> str:
    parts = [f"{row.name:28} {row.provider:24}"]
    if row.seconds:
        parts.append(f"{row.seconds.median:10.6f} s [{row.seconds.p20:.6f} {row.seconds.p80:.6f}]")
    if row.share_of_roofline:
        parts.append(f"{row.share_of_roofline:6.1%} of roofline")
    if row.peak_private_bytes is not None:
        parts.append(f"{row.peak_private_bytes / 2**20:8.1f} MiB")
    parts.append(f"error {row.check.error:.1e} (<= {row.check.bound:.1e})")
    parts += [f"{key}={value:.4g}" for key, value in row.extra.items() if isinstance(value, float)]
    return "  ".join(parts)


def time_rounds(
    competitors: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each competitor in `rounds` interleaved rounds; each round starts one competitor later."""
    for function in competitors.values():
        for _ in range(warmup):
            function()
    names = list(competitors)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            competitors[name]()
            samples[name].append(time.perf_counter() - start)
    return samples


def calls_for(function: Callable[[], object], seconds: float = 0.02) -> int:
    """How many calls fill `seconds`: short ops are timed in such bundles."""
    function()
    start = time.perf_counter()
    function()
    return max(1, math.ceil(seconds / max(time.perf_counter() - start, 1e-7)))


def repeated(function: Callable[[], object], calls: int) -> Callable[[], None]:
    """`function`, `calls` times in a row."""

    def run() -> None:
        for _ in range(calls):
            function()

    return run


def relative_error(result: Any, oracle: Any) -> float:
    """Largest absolute difference over the largest absolute value of the oracle; infinite where shapes differ."""
    result, oracle = (torch.as_tensor(value).detach().double() for value in (result, oracle))
    if result.shape != oracle.shape:
        return math.inf
    return ((result - oracle).abs().max() / oracle.abs().max()).item()


def run_git(*arguments: str) -> str | None:
    """Output of a git command in this repository, None outside of one."""
    try:
        return subprocess.run(
            ["git", "-C", str(BENCH), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Commit, versions and hardware of this run. Records under bench/results do not make a tree dirty."""
    changes = run_git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
    return {
        "commit": run_git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **_package_versions()},
        "hardware": {
            "cpu": _first_field("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "avx512_bf16": "avx512_bf16" in (_first_field("/proc/cpuinfo", "flags") or ""),
            "load_at_start": os.getloadavg()[0],
            "gpu": _gpu() if torch.cuda.is_available() else None,
        },
    }


def _gpu() -> dict[str, Any]:
    """The first device, and the CUDA that torch was built for."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "count": torch.cuda.device_count(),
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "driver": _first_field("/proc/driver/nvidia/version", "NVRM version") or _nvidia_smi("driver_version"),
        "torch_cuda": torch.version.cuda,
    }


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _first_field(path: str, key: str) -> str | None:
    try:
        with open(path) as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(key)), None)
    except OSError:
        return None
