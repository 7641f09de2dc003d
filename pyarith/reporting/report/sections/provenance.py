"""How everything on the page was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from pyarith.reporting.report.blocks import Block, Table, Text, moment, printable
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (path, value), such as ``("plan.rows", "512")``."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{printable(key)}" if name else printable(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(printable(one) for one in value) or "none"
    elif isinstance(value, float):
        yield name, f"{value:.6g}"
    else:
        yield name, "none" if value is None or value == {} else printable(value)


def command_line(words: Any) -> str:
    """As it was typed: the path of the program is of no interest."""
    first, *rest = map(str, words)
    program = PurePath(first).name
    return printable(shlex.join(["pyarith" if program == "__main__.py" else program, *rest]))


def _table(title: str, value: Any, folded: bool = True) -> Table:
    return Table(["", ""], [list(pair) for pair in flat(value)], title, words=2, folded=folded)


def build(source: Source) -> list[Block]:
    record = source.run.record
    made = [(record["command"], record), *((step.name, _of(step)) for step in source.steps)]
    commands = [
        [name, command_line(one["command_line"]), moment(one["started"]), f"{sum(one['seconds'].values()):.1f}"]
        for name, one in made
    ]
    blocks: list[Block] = [
        Table(["step", "command line", "started", "seconds"], commands, "How this was made", words=3),
        _table("Model", record["model"]),
        _table("Settings, seeds and backends", {k: record[k] for k in ("settings", "seeds", "backends")}),
        _table("Versions and machine", {"versions": record["versions"], "machine": record["machine"]}),
        _table("Seconds", {name: one["seconds"] for name, one in made}),
    ]
    for sign, run in record["runs"].items():
        parts = {name: run[name] for name in ("data", "patching", "seconds") if name in run}
        blocks.append(_table(f"{source.titles[sign]}: prompts and patching", parts))
    for step in source.steps:
        own = _of(step)
        blocks.append(_table(f"Step {step.name}: settings and versions", {k: own[k] for k in ("settings", "versions")}))
    changed = [step.name for step in source.steps if _of(step)["versions"] != record["versions"]]
    if changed:
        blocks.append(Text(f"Made with other versions than the discovery: {', '.join(changed)}.", "note"))
    return blocks


def _of(step: Any) -> dict[str, Any]:
    assert step.record is not None
    return dict(step.record)


PROVENANCE = Section("provenance", "Settings", build)
