"""Build pyarith on a GPU machine, check every kernel and the engine there, and measure them: one command.

    python bench/gpu.py [--quick] [--minutes 8] [--seed N] [--out FILE]

Needs torch, transformers, numpy, safetensors and pytest, to build also nvcc, cmake, ninja and pybind11; no network.
Rows go to bench/results/<GPU>.jsonl as they are measured, so it can be ended at any time. Exit status: 0 all well, 1
something failed or was not checked, 2 no GPU, 128 + the signal's number when ended by one.

`--rehearse` runs the same code at tiny sizes on the CPU: it shows that the command works and says nothing about speed.

This process never touches the device. A second one does (gpu_work.py); when that dies or hangs, the case that it was
at is reported as failed and a new one goes on with the next.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "bench", "tests", "tests/ops")]

import torch  # noqa: E402
from gpu_report import FAILED, PASSED, STAGES, Outcome, Report  # noqa: E402
from gpu_work import Options, work  # noqa: E402

OUT_OF_TIME = "out of time"
START_SECONDS = 120  # a process that has not asked for a case by then hangs
EXIT_SECONDS = 10
GRACE_SECONDS = 30  # what a case that began before the deadline may still take after it


class Ended(BaseException):
    """A signal asked this process to end."""


class Supervisor:
    """Starts the process that works, grants it time case by case, and keeps what it tells."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.report = Report(rehearsed=options.rehearse)
        self.deadline = time.monotonic() + 60 * options.minutes
        self._stages: dict[str, float] = {}  # when each stage began
        self._case: tuple[str, str, float] | None = None  # stage, name and begin of the case in progress

    def run(self) -> None:
        """Work until everything has an outcome, by one process after another; each gets at least one case done."""
        while True:
            known = len(self.report.outcomes)
            reason = self._one_process()
            if reason is None:
                return
            if self._case is not None:
                stage, name, begin = self._case
                self._settle(Outcome(stage, name, FAILED, reason, time.monotonic() - begin))
            if len(self.report.outcomes) == known:
                self.report.add(Outcome("build", "start", FAILED, reason))
                self.report.leave_out(f"start: {reason}")
                return

    def _one_process(self) -> str | None:
        """None when the process has gone through all cases, else why it ended before."""
        context = multiprocessing.get_context("spawn")
        connection, its_end = context.Pipe()
        process = context.Process(target=work, args=(self.options, dict(self.report.outcomes), its_end))
        process.start()
        its_end.close()
        try:
            while True:
                if not connection.poll(max(0.0, self._limit() - time.monotonic())):
                    return f"no end in {STAGES[self._case[0]].hangs if self._case else START_SECONDS:.0f} s"
                message = connection.recv()
                if message[0] == "done":
                    process.join(EXIT_SECONDS)
                    return None
                self._hear(connection, *message)
        except (EOFError, ConnectionResetError):
            process.join(EXIT_SECONDS)
            code = process.exitcode or 0
            return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
        finally:
            _end(process)
            connection.close()

    def _limit(self) -> float:
        if self._case is None:
            return time.monotonic() + START_SECONDS
        stage, _, begin = self._case
        return min(begin + STAGES[stage].hangs, max(begin, self.deadline) + GRACE_SECONDS)

    def _hear(self, connection: Connection, kind: str, *content: object) -> None:
        if kind == "plan":
            self.report.planned |= {name: stage for stage, name in content[0]}
        elif kind == "begin":
            refusal = self._grant(*content)
            with suppress(BrokenPipeError):
                connection.send(refusal)
        elif kind == "figure":
            self.report.figures.append(content[0])
        elif kind == "record":
            self.report.record = content[0]
        elif kind == "end":
            self._settle(content[0])

    def _settle(self, outcome: Outcome) -> None:
        self._case = None
        self.report.add(outcome)
        if outcome.status != PASSED:
            print(f"  {outcome.case}: {outcome.status}: {outcome.reason}", flush=True)

    def _grant(self, stage: str, name: str) -> str:
        """ "" lets the case begin; otherwise why it must not."""
        now = time.monotonic()
        if stage not in self._stages:
            self._stages[stage] = now
            plan = STAGES[stage]
            count = sum(planned == stage for planned in self.report.planned.values())
            left = max(0.0, self.deadline - now)
            print(f"{stage}: {plan.title}; cases: {count}, {plan.seconds:.0f} s of {left:.0f} s left", flush=True)
        if now >= min(self.deadline, self._stages[stage] + STAGES[stage].seconds):
            self.report.add(Outcome(stage, name, "not measured", OUT_OF_TIME))
            return OUT_OF_TIME
        self._case = (stage, name, now)
        return ""


def _end(process: multiprocessing.Process) -> None:
    """End the process and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(EXIT_SECONDS)  # a process that is stuck inside the driver does not end even when killed


def no_gpu() -> str:
    """Why this torch has no GPU and what to do about it, or an empty text."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
    else:
        why = f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no device or driver; "
        why += "see what nvidia-smi and CUDA_VISIBLE_DEVICES say"
    return f"no GPU: {why} (or try --rehearse on the CPU); nothing was checked"


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="build and check only")
    parser.add_argument("--rehearse", action="store_true", help="all stages at tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="what does not fit is left out")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: from the clock)")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    given = vars(parser.parse_args(arguments))
    if given["rehearse"] and given["out"] is None:
        given["out"] = Path(tempfile.mkdtemp()) / "rehearsal.jsonl"
    return Options(**{name: value for name, value in given.items() if value is not None})


def main(options: Options) -> int:
    missing = "" if options.rehearse else no_gpu()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    print(f"seed {options.seed}", flush=True)
    supervisor = Supervisor(options)

    def end(number: int, _: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    status = None
    try:
        supervisor.run()
    except Ended as ended:
        status = 128 + ended.args[0]
        supervisor.report.leave_out(f"ended by {signal.Signals(ended.args[0]).name}")
    print("\n".join(["", *supervisor.report.lines()]), flush=True)
    return status if status is not None else 0 if supervisor.report.all_well else 1


if __name__ == "__main__":
    sys.exit(main(parse()))
