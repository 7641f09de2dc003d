"""What `import pyarith` adds to `import torch`."""

import statistics
import subprocess
import sys

from harness import Check, Record, Row, Timing, time_rounds

IMPORTS = {"import torch": "import torch", "import torch, pyarith": "import torch, pyarith"}


def run(record: Record, rounds: int) -> None:
    """Whole processes, interleaved; the check is that each exits without a word."""
    noise: list[str] = []

    def start(code: str) -> None:
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        noise.append(process.stdout + process.stderr)

    samples = time_rounds({name: lambda code=code: start(code) for name, code in IMPORTS.items()}, rounds)
    check = Check("no output, exit status 0", float(sum(map(len, noise))), 0.0)
    added = statistics.median(samples["import torch, pyarith"]) - statistics.median(samples["import torch"])
    for name, seconds in samples.items():
        extra = {"added_seconds": added} if "pyarith" in name else {}
        record.write(
            Row(name="startup", provider=name, shape={}, dtype="", check=check, seconds=Timing.of(seconds), extra=extra)
        )
