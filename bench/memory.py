"""Peak private memory of a call, seen from outside the process.

Private memory is RssAnon of /proc/<pid>/status: heap, anonymous maps and allocator caches, without mapped files. A
second process samples it, so a call that holds the interpreter lock is seen too. The kernel's own high-water mark
(VmHWM, reset before the call) misses no peak but counts mapped files; it is reported beside the samples as a bound.

glibc keeps freed memory: without care the memory a warm-up has left behind would hide what the measured call needs.
`malloc_trim` therefore runs right before the starting value is read. Nothing else about malloc is changed, since the
process of a user has the defaults too.
"""

import ctypes
import os
import subprocess
import sys
from types import TracebackType

INTERVAL_SECONDS = 0.001

_SAMPLER = """
import sys, select
path, interval, peak = f"/proc/{sys.argv[1]}/status", float(sys.argv[2]), 0
print("ready", flush=True)
while True:
    with open(path) as file:
        peak = max(peak, next(int(line.split()[1]) for line in file if line.startswith("RssAnon")))
    if select.select([sys.stdin], [], [], interval)[0]:
        break
print(peak, flush=True)
"""


def status_bytes(field: str) -> int:
    """A memory field of this process's status, such as RssAnon or VmHWM, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def trim() -> None:
    """Give freed heap back to the system (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Context manager: afterwards `private_bytes` and `resident_bytes` hold the peaks above the start of the block."""

    private_bytes: int
    resident_bytes: int

    def __enter__(self) -> "PeakMemory":
        self._sampler = subprocess.Popen(
            [sys.executable, "-S", "-c", _SAMPLER, str(os.getpid()), str(INTERVAL_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()
        trim()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._private, self._resident = status_bytes("RssAnon"), status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resident_bytes = status_bytes("VmHWM") - self._resident
        output, _ = self._sampler.communicate("stop")
        self.private_bytes = int(output.split()[-1]) * 1024 - self._private
