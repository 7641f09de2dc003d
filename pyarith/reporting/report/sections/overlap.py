"""Whether operators share heads."""

from __future__ import annotations

import numpy as np

from pyarith.reporting.report.blocks import (
    Block,
    Chart,
    Table,
    Text,
    between,
    label,
    number,
    plain,
    signed,
    small,
)
from pyarith.reporting.report.charts import Axis, grid
from pyarith.reporting.report.sections.attention import reason
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Rows, Source


def build(source: Source) -> list[Block]:
    step = source.step("analysis")
    assert step.record is not None
    rows, said = step.table("overlap.csv"), step.record["overlap"]
    if not rows or said is None:
        return [Text(reason(source, "overlap"))]
    heads = said["key_heads"]
    cells = [
        [
            f"{source.titles[row['a']]}, {source.titles[row['b']]}",
            f"{number(row['common']):.0f} of {len(heads[row['a']])} and {len(heads[row['b']])}",
            plain(number(row["jaccard"])),
            plain(number(row["expected_jaccard"])),
            small(number(row["p"])),
            signed(number(row["spearman"]), 3),
            between(number(row["spearman_low"]), number(row["spearman_high"]), signed),
        ]
        for row in rows
    ]
    columns = ["operators", "key heads shared", "Jaccard", "by chance", "p", "Spearman", "interval"]
    table = Table(columns, cells, file="analysis/overlap.csv")
    own = [[source.titles[sign], ", ".join(names) or "none"] for sign, names in heads.items()]
    note = (
        f"Key heads: {said['key']}. Jaccard: share of common heads among those of either; p: chance that unrelated "
        "sets of these sizes share as many. Spearman: rank correlation of the effects of all "
        f"{said['heads']} heads."
    )
    lists = Table(["operator", "key heads"], own, "Key heads by operator", words=2, folded=True)
    return [_matrix(source, rows), table, Text(note, "note"), lists]


def _matrix(source: Source, rows: Rows) -> Chart:
    names = [sign for sign in source.run.signs if any(sign in (row["a"], row["b"]) for row in rows)]
    z = np.full((len(names), len(names)), np.nan)
    hover = [[""] * len(names) for _ in names]
    for row in rows:
        i, j = names.index(row["a"]), names.index(row["b"])
        z[i, j] = z[j, i] = number(row["spearman"])
        text = (
            f"<b>{label(source.titles[row['a']])}, {label(source.titles[row['b']])}</b><br>Spearman "
            f"{signed(number(row['spearman']), 3)}<br>Jaccard {plain(number(row['jaccard']))} "
            f"({plain(number(row['expected_jaccard']))} by chance)"
        )
        hover[i][j] = hover[j][i] = text
    axis = Axis([label(source.titles[sign]) for sign in names])
    figure = grid(z, axis, axis, hover, limit=1.0, text="{:.2f}".format)
    return Chart(figure, "Rank correlation (Spearman) of the effects of all heads: 1 is the same order.")


OVERLAP = Section("overlap", "Overlap", build, "analysis", "analyze")
