"""Fine-tuning of the chosen heads: its losses, and what was trained."""

from __future__ import annotations

from typing import Any

from pyarith.reporting.report.blocks import Block, Chart, Table, Text, count, number, plain
from pyarith.reporting.report.charts import Axis, Line, lines
from pyarith.reporting.report.sections.provenance import flat
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source

_POINTS = 60  # of the curve: more steps are averaged


def build(source: Source) -> list[Block]:
    step = source.step("tune")
    assert step.record is not None
    found = step.record["result"]
    rows = step.table("losses.csv")
    names, means = _thinned([number(row["task_loss"]) for row in rows])
    hover = [f"steps {name}<br>loss {plain(mean)}" for name, mean in zip(names, means, strict=True)]
    width = -(-len(rows) // _POINTS)
    figure = lines(
        [Line("mean cross-entropy of the completion", means, "c1", hover)], Axis(names, "step"), y_title="loss"
    )
    says = (
        f"Loss of {count(len(rows), 'step')}"
        + (f", means of {width} steps each" if width > 1 else "")
        + f"; first {plain(found['loss']['first'])}, last {plain(found['loss']['last'])}."
    )
    trained = f"{count(len(found['heads']), 'head')} ({', '.join(found['heads']) or 'none'})"
    if found["mlps"]:
        trained += f" and the MLPs of layers {', '.join(map(str, found['mlps']))}"
    shared = (
        f" Their keys and values are read by {', '.join(found['shared_heads'])} too." if found["shared_heads"] else ""
    )
    about = f"Trained: {trained}, {found['parameters']:,} parameters; everything else kept its bits.{shared}"
    how: dict[str, Any] = {name: found[name] for name in ("settings", "data", "state_bytes", "memory", "prefix_cache")}
    return [
        Chart(figure, says),
        Text(about),
        Table(
            ["setting", "value"], list(flat(how)), "How it was trained", words=2, folded=True, file="tune/losses.csv"
        ),
    ]


def _thinned(losses: list[float]) -> tuple[list[str], list[float]]:
    """(steps, mean loss) of at most ``_POINTS`` groups of steps."""
    width = max(1, -(-len(losses) // _POINTS))
    groups = [(start, losses[start : start + width]) for start in range(0, len(losses), width)]
    names = [str(start + 1) if len(some) == 1 else f"{start + 1}-{start + len(some)}" for start, some in groups]
    return names, [sum(some) / len(some) for _, some in groups]


TUNE = Section("tune", "Fine-tuning", build, "tune", "tune")
