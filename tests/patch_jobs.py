"""Runs that are killed or have company, all in one script, since a fresh interpreter takes seconds to import torch.

``python patch_jobs.py FOLDER`` prints one JSON object: job -> what was seen. Runs are forked from this process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_jobs
import torch
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.reporting import SavedRun
from pyarith.reporting.files import file_hash

DISCOVER = ("discover", Path(pa.__file__).parent / "demo" / "model", "-n", 12, "--verify", 0)


def forked(act: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(act: Callable[[], Any], wait: float) -> int:
    """Run ``act`` in a process that is killed after ``wait`` seconds; its exit status."""
    pid = forked(act)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    return status(pid)


def slowly(folder: Path) -> dict[str, Any]:
    """Six blocks that take their time, writing them too."""
    real = os.fsync

    def fsync(file: int) -> None:
        time.sleep(0.02)
        real(file)

    os.fsync = fsync
    rank_jobs.before_block(lambda _: time.sleep(0.03))
    return rank_jobs.patch(resume=folder)


def kills(work: Path) -> list[Any]:
    """Per seed: waits, exit statuses, blocks kept, the bits in the end, hidden files left."""
    found = []
    for seed in range(6):
        rng, folder = random.Random(seed), work / f"killed-{seed}"
        waits = [rng.uniform(0, 0.45) for _ in range(2)]
        statuses = [kill(lambda: slowly(folder), wait) for wait in waits]  # noqa: B023
        end = rank_jobs.patch(resume=folder)
        hidden = [one.name for one in folder.glob(".*")]
        found.append({"waits": waits, "statuses": statuses, "end": end["bits"], "kept": end["resumed_blocks"]})
        found[-1]["hidden"] = hidden
    return found


def together(work: Path) -> dict[str, Any]:
    """Three processes with one folder, which a fourth throws away again and again."""
    folder = work / "together"

    def run(name: str) -> None:
        (work / name).write_text(slowly(folder)["bits"])

    names = ["first", "second", "third"]
    pids = [forked(lambda: run(name)) for name in names]  # noqa: B023
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        gone = work / f"gone-{time.monotonic_ns()}"
        if folder.exists():
            os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)
        time.sleep(0.08)
    return {"statuses": [status(pid) for pid in pids], "bits": [(work / name).read_text() for name in names]}


def discover(out: Path) -> None:
    done = CliRunner().invoke(app, [str(one) for one in (*DISCOVER, "--out", out)], prog_name="pyarith")
    if done.exit_code != 0:
        raise SystemExit(done.output)


def state(path: Path) -> dict[str, Any]:
    """What a run directory holds, but for times."""
    run = SavedRun.open(path)
    names = ("heads.csv", "mlps.csv", "prompts.csv", "result/tensors.safetensors")
    hidden = sorted(one.name for one in path.glob(".*"))
    return {"signs": list(run.signs), "files": {name: file_hash(path / name) for name in names}, "hidden": hidden}


def commands(work: Path) -> dict[str, Any]:
    """Directories of a whole run, of runs that were killed, and of two at the same time."""
    discover(work / "whole")
    start = time.monotonic()
    if status(forked(lambda: discover(work / "again"))) != 0:
        raise SystemExit("the command failed in a forked process")
    took = time.monotonic() - start
    rng = random.Random(7)
    found: dict[str, Any] = {"whole": state(work / "whole"), "killed": []}
    for number in range(3):
        out = work / f"killed-run-{number}"
        wait = rng.uniform(0.1, took)
        killed = kill(lambda: discover(out), wait)  # noqa: B023
        ended = status(forked(lambda: discover(out)))  # noqa: B023
        found["killed"].append({"wait": wait, "statuses": [killed, ended], **state(out)})
    pids = [forked(lambda: discover(work / "both")) for _ in range(2)]
    found["both"] = {"statuses": [status(pid) for pid in pids], **state(work / "both")}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    rank_jobs.planned()
    alone = rank_jobs.patch()
    print(
        json.dumps({"alone": alone["bits"], "kills": kills(where), "together": together(where), **commands(where)}),
        flush=True,
    )
