"""Direct logit attribution: what each part writes towards the answer."""

from __future__ import annotations

import numpy as np

from pyarith.reporting.report.blocks import Block, Chart, Table, Tabs, Text, label, number, plain, signed, small
from pyarith.reporting.report.charts import Axis, bars, grid, numbered, reach
from pyarith.reporting.report.sections.attention import by_operator, reason
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Rows, Source


def build(source: Source) -> list[Block]:
    step = source.step("analysis")
    assert step.record is not None
    tables = by_operator(step.table("attribution.csv"))
    limit = reach(*([number(r["logit"]) for r in rows if r["kind"] == "head"] for rows in tables.values()))
    return [
        Tabs(
            {
                title: _panel(title, tables[sign], step.record["attribution"][sign], limit)
                if sign in tables
                else [Text(reason(source, "attribution", sign))]
                for sign, title in source.titles.items()
            }
        )
    ]


def _name(row: dict[str, str]) -> str:
    """``head 2.7``, ``mlp 4``, ``embedding``."""
    if int(row["head"]) >= 0:
        return f"head {row['layer']}.{row['head']}"
    word = "MLP" if row["kind"] == "mlp" else row["kind"].replace("_", " ")
    return word if int(row["layer"]) < 0 else f"{word} {row['layer']}"


def _hover(title: str, row: dict[str, str]) -> str:
    logit, spread = number(row["logit"]), number(row["spread"])
    return f"<b>{_name(row)}</b>, {label(title)}<br>{signed(logit, 3)} logits<br>sd over prompts {plain(spread)}"


def _panel(title: str, rows: Rows, said: dict[str, object], limit: float) -> list[Block]:
    own = [row for row in rows if row["kind"] == "head"]
    z = np.full([1 + max(int(row[name]) for row in own) for name in ("layer", "head")], np.nan)
    hover = [[""] * z.shape[1] for _ in z]
    for row in own:
        at = int(row["layer"]), int(row["head"])
        z[at] = number(row["logit"])
        hover[at[0]][at[1]] = _hover(title, row)
    axes = numbered(z.shape[1], "head"), numbered(len(z), "layer")
    heads = grid(z, *axes, hover, limit=limit, text=lambda one: "" if abs(one) < 0.05 else f"{one:.1f}")
    rest = [row for row in rows if row["kind"] == "mlp" or (row["kind"] != "head" and number(row["logit"]) != 0)]
    parts = [number(row["logit"]) for row in rest]
    others = bars(parts, Axis([_name(row) for row in rest]), [_hover(title, row) for row in rest])
    written = [row for row in rows if number(row["logit"]) or number(row["spread"])]  # no bias: 0 on every prompt
    cells = [
        [_name(row), signed(number(row["logit"]), 3), plain(number(row["spread"]))]
        for row in sorted(written, key=lambda row: -abs(number(row["logit"])))
    ]
    every = f"All {len(cells)} parts that are not 0"
    table = Table(["part", "logits, mean", "sd"], cells, every, folded=True, file="analysis/attribution.csv")
    return [
        Chart(heads, f"What every head writes directly towards the answer, {title}, in logits; blue raises it."),
        Chart(others, "The same of the MLPs and the rest, on a scale of its own."),
        Text(
            f"Quantity: {said['semantics']}. The parts add up to the model's own logit within "
            f"{small(number(said['error']))}.",
            "note",
        ),
        table,
    ]


ATTRIBUTION = Section("attribution", "Direct attribution", build, "analysis", "analyze")
