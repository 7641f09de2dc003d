"""What `import pyarith` adds to `import torch`."""

import statistics
import subprocess
import sys
from collections.abc import Callable

from harness import Check, Record, Row, Timing, time_rounds

TORCH, BOTH = "import torch", "import torch, pyarith"
CLOCK = "import time, {before}; start = time.perf_counter(); import pyarith; {use}; print(time.perf_counter() - start)"
INSIDE = {  # seconds by the clock of the process itself; names of pyarith are loaded on first use
    "import pyarith after torch": CLOCK.format(before="torch", use="pass"),
    "pyarith.fast_patch after transformers": CLOCK.format(before="torch, transformers", use="pyarith.fast_patch"),
}


def run(record: Record, rounds: int) -> None:
    """Whole processes and the clock inside, interleaved; the check is that each process exits without a warning."""
    noise: list[str] = []

    def start(code: str) -> str:
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        noise.append(process.stderr)
        return process.stdout

    inside: dict[str, list[float]] = {name: [] for name in INSIDE}
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: start(name) for name in (TORCH, BOTH)}
    for name, code in INSIDE.items():
        calls[name] = lambda name=name, code=code: inside[name].append(float(start(code)))
    samples = {**time_rounds(calls, rounds), **{name: values[-rounds:] for name, values in inside.items()}}
    check = Check("no warning, exit status 0", float(sum(map(len, noise))), 0.0)
    added = statistics.median(both - torch for both, torch in zip(samples[BOTH], samples[TORCH], strict=True))
    for name, seconds in samples.items():
        extra = {"added_seconds": added} if name == BOTH else {}
        record.write(
            Row(name="startup", provider=name, shape={}, dtype="", check=check, seconds=Timing.of(seconds), extra=extra)
        )
