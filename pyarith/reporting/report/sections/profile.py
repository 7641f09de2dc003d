"""Where the time and memory of the patching go."""

from __future__ import annotations

from pyarith.reporting.profiles import amount, duration
from pyarith.reporting.report.blocks import Block, Table, Text, number, share
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source

_OPS = 40  # of the table; the file has all


def build(source: Source) -> list[Block]:
    step = source.step("profile")
    assert step.record is not None
    found, took = step.record["profile"], step.record["seconds"]
    rates = found["roofline"]
    same = "the same bits" if found["unchanged"] else "other bits"
    about = (
        f"{found['prompts']} prompts, {found['model']['dtype']} on {found['model']['device']}: "
        f"{duration(took['timed'])}. Measured beside it: products {amount(rates['flop_per_second'], 'FLOP')}/s, copies "
        f"{amount(rates['bytes_per_second'])}/s, read and written. A phase is timed in a run of its own; ops are timed "
        f"while each of them is counted, which took {duration(took['counted'])} and gave {same}."
    )
    phases = [
        [
            one["phase"],
            duration(one["seconds"]),
            amount(one["flop"], "FLOP"),
            amount(one["bytes"]),
            share(one["roofline"], 0),
        ]
        for one in found["phases"]
    ]
    compared = [
        [name, _written(name, one["forecast"]), _written(name, one["found"])] for name, one in found["compared"].items()
    ]
    memory = found["high_water"]
    held = sorted(memory["held"].items(), key=lambda pair: -pair[1])
    ops = [
        [
            row["phase"],
            row["op"],
            row["calls"],
            duration(number(row["seconds"])),
            amount(number(row["flop"]), "FLOP"),
            amount(number(row["bytes"])),
            share(number(row["roofline"]), 0),
        ]
        for row in step.table("ops.csv")[:_OPS]
    ]
    most = f"Most memory beyond the model: {amount(memory['bytes'])}, in {memory['phase']}"
    return [
        Text(about),
        Table(["phase", "time", "work", "moved", "of the roofline"], phases, "By phase"),
        Table(["", "forecast", "found"], compared, "Forecast"),
        Table(["tensors for", "bytes"], [[name, amount(size)] for name, size in held], most, folded=True),
        Table(
            ["phase", "op", "calls", "time", "work", "moved", "of the roofline"],
            ops,
            "By op, longest first",
            words=2,
            folded=True,
            file="profile/ops.csv",
        ),
    ]


def _written(name: str, value: float) -> str:
    if name == "seconds":
        return duration(value)
    return amount(value, "FLOP") if name.endswith("FLOP") else amount(value)


PROFILE = Section("profile", "Time and memory", build, "profile", "profile")
