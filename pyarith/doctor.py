"""What this installation is and what it can run, as data; ``pyarith doctor`` prints it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarith.reporting.rundir import versions

if TYPE_CHECKING:
    from pyarith.ops import ReportRow

NONE = "-"


@dataclass(frozen=True)
class Diagnosis:
    """Everything a bug report needs.

    Attributes:
        versions: package -> version, None where not installed.
        machine: system, processor, cores, threads, memory.
        devices: one line per device that torch sees, or why there is none.
        native: what ``pyarith.ops.native_info()`` says of the compiled extension.
        ops: op -> backend -> None where it can run in fp32 on its own device, ``NONE`` where the op has no such
            implementation, else the reason.
        reasons: backend and why it cannot run, in any dtype, each once.
        chosen: (device, dtype) -> op -> backend that "auto" takes.
        families: supported model families.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    devices: list[str]
    native: dict[str, Any]
    ops: dict[str, dict[str, str | None]]
    reasons: list[tuple[str, str]]
    chosen: dict[tuple[str, str], dict[str, str]]
    families: list[str]


def diagnose() -> Diagnosis:
    """Look at this installation. Starts CUDA only where torch sees a device."""
    import torch

    from pyarith import ops
    from pyarith.models.families import FAMILIES

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    rows = [replace(row, reason=NONE if _missing(row) else row.reason) for row in ops.report()]
    names = list(dict.fromkeys(row.op for row in rows))
    others = [row for dtype in dtypes for row in ops.report(dtype) if not _missing(row)]
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = {
        (device, str(dtype).removeprefix("torch.")): {op: ops.backend_of(op, device, dtype) for op in names}
        for device in kinds
        for dtype in dtypes
    }
    return Diagnosis(
        versions=versions(),
        machine=_machine(torch.get_num_threads()),
        devices=_devices(),
        native=ops.native_info(),
        ops={op: {row.backend: row.reason for row in rows if row.op == op} for op in names},
        reasons=sorted({(row.backend, row.reason) for row in others if row.reason is not None}),
        chosen=chosen,
        families=sorted(FAMILIES),
    )


def _missing(row: ReportRow) -> bool:
    return row.reason is not None and row.reason.startswith(f"{row.op} has no")


def _machine(threads: int) -> dict[str, str]:
    facts = {"system": platform.platform(), "processor": platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts |= {"processor": models[0]} if models else {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {**facts, "cores": str(cores), "torch threads": str(threads)}


def _devices() -> list[str]:
    import torch

    lines = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            capability = f"{found.major}.{found.minor}"
            lines.append(f"cuda:{index}  {found.name}, capability {capability}, {found.total_memory / 2**30:.0f} GiB")
    elif torch.version.cuda is None:
        lines.append("cuda: none (this torch is built without CUDA)")
    else:
        lines.append(f"cuda: none (torch is built for CUDA {torch.version.cuda}; no device or driver found)")
    if torch.backends.mps.is_available():
        lines.append("mps  (runs the reference implementations)")
    return lines
