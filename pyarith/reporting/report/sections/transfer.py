"""Other tasks with the heads of this run ablated: tasks by lists of heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyarith.evaluation import TransferResult
from pyarith.reporting.report.blocks import (
    Block,
    Chart,
    Table,
    Text,
    between,
    count,
    label,
    percent,
    printable,
    share,
    small,
)
from pyarith.reporting.report.charts import Axis, grid
from pyarith.reporting.report.sections.provenance import flat
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source

_FILE = "transfer/transfer.csv"


def build(source: Source) -> list[Block]:
    result = TransferResult.load(source.step("transfer").folder / "result.json")
    rows = {(row["task"], row["heads"]): row for row in result.rows()}
    z = 100 * result.matrix("relative_drop_correct")
    hover = [[_hover(result, rows[task, heads]) for heads in result.head_lists] for task in result.tasks]
    tasks, lists = ([label(name, 24) for name in names] for names in (result.tasks, result.head_lists))
    figure = grid(z, Axis(lists, "heads ablated"), Axis(tasks), hover, limit=100.0, unit="%", text="{:+.0f}".format)
    says = (
        "Relative drop of the accuracy on items that the intact model gets right, tasks by ablated heads, in percent; "
        "red is worse than intact."
    )
    blocks: list[Block] = [Chart(figure, says)]
    if result.never_right:
        never = printable(", ".join(result.never_right))
        blocks.append(Text(f"The intact model never gets these right, so there is nothing to knock out: {never}."))
    names = list(dict.fromkeys(name for one in result.cells for name in one.controls))
    blocks += [_cells(list(rows.values())), *([_controls(result, names)] if names else [])]
    methods = "; ".join(dict.fromkeys(one.method for one in result.cells))
    blocks.append(Text(f"Intervals and p of the change in accuracy: {methods}. q: Benjamini-Hochberg.", "note"))
    lists_of = {one.heads: one.head_names for one in result.cells}
    own = [[printable(name), ", ".join(heads)] for name, heads in lists_of.items()]
    blocks.append(Table(["heads", "which"], own, "The lists of heads", words=2, folded=True))
    settings = list(flat(result.settings))
    return [*blocks, Table(["setting", "value"], settings, "How it was measured", words=2, folded=True)]


def _hover(result: TransferResult, row: dict[str, Any]) -> str:
    cell = result.cell(row["task"], row["heads"])
    lines = [
        f"<b>{label(row['task'], 60)}</b>, {label(row['heads'], 60)}",
        f"{count(row['n'], 'item')}, {count(row['k'], 'head')} ablated",
        f"accuracy {share(row['accuracy_intact'])} intact, {share(row['accuracy'])} ablated",
        f"relative drop {percent(row['relative_drop_correct'])} where right, {percent(row['relative_drop'])} of all",
    ]
    if not math.isnan(row["low"]):
        lines.append(f"change in accuracy {percent(row['difference'])}, interval {between(row['low'], row['high'])}")
        lines.append(f"p {small(row['p'])}, q {small(row['q'])}")
    for name, control in cell.controls.items():
        accuracies = np.array(control.accuracy)
        lines.append(
            f"{label(name)}: {share(accuracies.mean())} ({share(accuracies.min())} .. {share(accuracies.max())}), "
            f"p {small(control.p)}"
        )
    return "<br>".join(lines)


def _cells(rows: list[dict[str, Any]]) -> Table:
    cells = [
        [
            printable(row["task"]),
            printable(row["heads"]),
            str(row["k"]),
            str(row["n"]),
            share(row["accuracy_intact"]),
            share(row["accuracy"]),
            percent(row["relative_drop_correct"]),
            percent(row["relative_drop"]),
            percent(row["difference"]),
            between(row["low"], row["high"]),
            "" if math.isnan(row["p"]) else small(row["p"]),
            "" if math.isnan(row["q"]) else small(row["q"]),
            f"{row['lost']}, {row['gained']}",
            small(row["p_mcnemar"]),
        ]
        for row in rows
    ]
    columns = ["task", "heads", "k", "items", "intact", "ablated", "drop where right", "drop of all", "change"]
    columns += ["interval", "p", "q", "lost, gained", "p (McNemar)"]
    return Table(columns, cells, "Accuracy with the heads ablated", words=2, file=_FILE)


def _controls(result: TransferResult, names: list[str]) -> Table:
    cells = []
    for one in result.cells:
        for name, control in one.controls.items():
            accuracies = np.array(control.accuracy)
            cells.append(
                [
                    printable(one.task),
                    printable(one.heads),
                    printable(name).replace("_", " "),
                    str(len(accuracies)),
                    share(accuracies.mean()),
                    f"{share(accuracies.min())} .. {share(accuracies.max())}",
                    percent(float(np.mean(control.relative_drop_correct))),
                    small(control.p),
                ]
            )
    columns = ["task", "heads", "control", "draws", "accuracy", "worst .. best", "drop where right", "p against it"]
    return Table(columns, cells, "Controls: as many other heads ablated", words=3, folded=True, file=_FILE)


TRANSFER = Section("transfer", "Transfer", build, "transfer", "transfer")
