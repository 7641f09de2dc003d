"""The step ``profile``: where the time and memory of a run's patching go, as tables."""

from __future__ import annotations

from typing import Any

from pyarith.discovery.profile import Cost, PatchProfile
from pyarith.reporting.steps import Step
from pyarith.reporting.tables import write_csv


def op_rows(costs: tuple[Cost, ...]) -> list[dict[str, Any]]:
    """One row for each op of each phase, longest first."""
    return [
        {
            "phase": cost.phase,
            "op": cost.op,
            "calls": cost.calls,
            "seconds": cost.seconds,
            "flop": cost.flop,
            "bytes": cost.bytes,
            "roofline": cost.roofline,
        }
        for cost in costs
    ]


def write_step(step: Step, profile: PatchProfile) -> dict[str, Any]:
    """Write ops.csv; returns what the step's record holds besides."""
    write_csv(step.file("ops.csv"), op_rows(profile.ops))
    content = profile.record()
    del content["ops"], content["seconds"]
    return {"profile": content}


def duration(seconds: float) -> str:
    """``12.3 ms``, ``4.56 s``, ``3.2 min``, ``1.4 h``, ``2.5 days``."""
    for limit, size, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 86400)} days"


def amount(size: float, unit: str = "B") -> str:
    """Bytes in MiB and the like, or another unit with decimal prefixes: ``2.3 GiB``, ``515 TFLOP``."""
    base, names = (
        (1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")) if unit == "B" else (1000, ("", "k", "M", "G", "T", "P", "E"))
    )
    power = 0
    while size >= 999.5 and power < len(names) - 1:
        size, power = size / base, power + 1
    return f"{_three(size)} {names[power]}{unit}"


def _three(value: float) -> str:
    """At least three digits, never an exponent above them."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"
