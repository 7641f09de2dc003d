"""The process that touches the GPU: runs the cases one by one and tells the supervisor (gpu.py) of each.

Everything a later case needs of an earlier one travels in outcomes, so that this process may die of a case and a new
one goes on behind it.
"""

import gc
import os
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu_report import FAILED, PASSED, QUICK, SKIPPED, Figure, Outcome
from harness import Record, Row

ROOT = Path(__file__).resolve().parent.parent
BUILD_LOG = ROOT / "build" / "gpu-build.log"


@dataclass(frozen=True)
class Options:
    quick: bool = False
    rehearse: bool = False
    minutes: float = 8.0
    seed: int = field(default_factory=lambda: time.time_ns() % 2**31)
    out: Path | None = None


@dataclass(frozen=True)
class Case:
    """One step of a stage; it runs only where the cases that it needs have passed."""

    stage: str
    name: str
    run: Callable[["Bench"], None]
    needs: tuple[str, ...] = ()


class NotMeasured(Exception):
    """Raised by a case that cannot be measured, with the reason; it did not fail."""


class Bench:
    """What the cases share: the device, the record, what came out before, and the way to report."""

    def __init__(self, options: Options, outcomes: dict[str, Outcome], connection: Connection) -> None:
        self.tiny, self.seed = options.rehearse, options.seed
        self.device = torch.device("cpu" if options.rehearse else "cuda:0")
        self.path = options.out or ROOT / "bench" / "results" / f"{self._slug()}.jsonl"
        self.outcomes = outcomes
        self.cache: dict[str, Any] = {}  # models and results that several cases of a stage use
        self.case = ""
        self.values: dict[str, float] = {}
        self._connection = connection

    def _slug(self) -> str:
        name = "rehearsal" if self.tiny else torch.cuda.get_device_name(self.device)
        return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())

    @cached_property
    def record(self) -> Record:
        return Record(self.path, quick=self.tiny)

    @cached_property
    def clock(self):  # type: ignore[no-untyped-def]
        from gpu_clock import Clock  # imports pyarith, which stage "build" may have to make first

        return Clock(self.device)

    def generator(self, name: str) -> torch.Generator:
        """Fresh numbers for each run of the command, the same for one seed whatever ran before."""
        return torch.Generator(self.device).manual_seed(self.seed ^ zlib.crc32(name.encode()))

    def write(self, row: Row) -> None:
        self.record.write(row)
        self._connection.send(("record", str(self.path)))

    def figure(self, what: str, text: str, target: str = "", reached: bool | None = None) -> None:
        """A line of the table, told at once: it stays where a later line of the case fails."""
        self._connection.send(("figure", Figure(self.case, what, text, target, reached)))

    def passed(self, case: str) -> bool:
        return case in self.outcomes and self.outcomes[case].status == PASSED

    def forget(self) -> None:
        """Free what cases kept for each other."""
        self.cache.clear()
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    def value(self, case: str, name: str) -> float | None:
        """A number that an earlier case left, None where that case has not passed."""
        return self.outcomes[case].values.get(name) if self.passed(case) else None


def build(bench: Bench) -> None:
    """Build the extension in place; in the rehearsal only the machinery around it, the extension in use stays."""
    environment = {**os.environ}
    if bench.tiny:
        arguments = ["--version"]
    else:
        major, minor = torch.cuda.get_device_capability(bench.device)
        target = "90a-real" if (major, minor) == (9, 0) else f"{major}{minor}-real"
        environment |= {"PYARITH_CUDA": "1", "PYARITH_CUDA_ARCHS": target}
        arguments = ["build_ext", "--inplace"]
    BUILD_LOG.parent.mkdir(exist_ok=True)
    begin = time.perf_counter()
    with BUILD_LOG.open("w") as log:
        done = subprocess.run(
            [sys.executable, "setup.py", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    seconds = time.perf_counter() - begin
    if done.returncode:
        end = "\n".join(BUILD_LOG.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"setup.py ended with {done.returncode}; the end of {BUILD_LOG}:\n{end}")
    bench.values["seconds"] = seconds
    bench.figure("build", f"{seconds:.1f} s")


def cases(bench: Bench, quick: bool) -> list[Case]:
    """All cases behind the build, in order."""
    import gpu_checks
    import gpu_engine
    import gpu_engine_checks
    import gpu_ops
    import gpu_tuning

    planned = [*gpu_checks.cases(bench), *gpu_engine_checks.cases(bench), gpu_tuning.check_case()]
    planned += [*gpu_ops.cases(bench), *gpu_tuning.cases(), *gpu_engine.cases()]
    return [case for case in planned if not quick or case.stage in QUICK]


def work(options: Options, outcomes: dict[str, Outcome], connection: Connection) -> None:
    """Entry of the process: runs every case without an outcome that the supervisor lets run."""
    os.setsid()  # the supervisor ends the whole group: a build has children
    torch.set_num_threads(1)  # the host runs tiny models only, which wait for a second thread
    bench = Bench(options, outcomes, connection)
    first = Case("build", "build", build)
    connection.send(("plan", [(first.stage, first.name)]))
    if not _run(bench, first):
        return
    planned = cases(bench, options.quick)
    connection.send(("plan", [(case.stage, case.name) for case in planned]))
    stage = ""
    for case in planned:
        if case.stage != stage:
            stage = case.stage
            bench.forget()
        if not _run(bench, case):
            return
    connection.send(("done",))


def _run(bench: Bench, case: Case) -> bool:
    """Run one case, report it; False where the device is lost to this process."""
    if case.name in bench.outcomes:
        return True
    missing = [name for name in case.needs if not bench.passed(name)]
    if missing:
        _end(bench, Outcome(case.stage, case.name, SKIPPED, f"{', '.join(missing)}: not passed"))
        return True
    bench._connection.send(("begin", case.stage, case.name))
    refusal = bench._connection.recv()
    if refusal:
        bench.outcomes[case.name] = Outcome(case.stage, case.name, SKIPPED, refusal)
        return True
    bench.case, bench.values = case.name, {}
    begin = time.perf_counter()
    status, reason = PASSED, ""
    try:
        case.run(bench)
        bench.clock.synchronise()  # an error of a kernel belongs to the case that started it
    except NotMeasured as error:
        status, reason = SKIPPED, str(error)
    except Exception as error:  # whatever a case raises is its outcome; the cases after it still run
        traceback.print_exc()
        status, reason = FAILED, f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.300}"
    _end(bench, Outcome(case.stage, case.name, status, reason, time.perf_counter() - begin, bench.values))
    return status != FAILED or _alive(bench)


def _end(bench: Bench, outcome: Outcome) -> None:
    bench.outcomes[outcome.case] = outcome
    bench._connection.send(("end", outcome))


def _alive(bench: Bench) -> bool:
    """Whether the device still answers: after an illegal access every further call of the process fails."""
    try:
        bench.forget()
        bench.clock.synchronise()
    except RuntimeError as error:
        print(f"the device is lost to this process ({error}); a new one goes on", flush=True)
        return False
    return True
