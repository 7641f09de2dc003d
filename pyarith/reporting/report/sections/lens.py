"""Logit lens of one prompt, before and after each MLP, and what each MLP promotes."""

from __future__ import annotations

from pyarith.reporting.report.blocks import Block, Table, Tabs, Text, number, printable, signed
from pyarith.reporting.report.sections.attention import by_operator, reason
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Rows, Source


def build(source: Source) -> list[Block]:
    step = source.step("analysis")
    tables, promoted = (by_operator(step.table(name)) for name in ("lens.csv", "lens_promoted.csv"))
    return [
        Tabs(
            {
                title: _panel(tables[sign], promoted.get(sign, []))
                if sign in tables
                else [Text(reason(source, "lens", sign))]
                for sign, title in source.titles.items()
            }
        )
    ]


def _panel(rows: Rows, promoted: Rows) -> list[Block]:
    cells: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rows:
        text = f"{row['text']!r}\u00a0{number(row['probability']):.3f}"
        cells.setdefault((row["layer"], row["stage"]), []).append((int(row["rank"]), text))
    for row in promoted:
        text = f"{row['text']!r}\u00a0{signed(number(row['logits']))}"
        cells.setdefault((row["layer"], "promoted"), []).append((int(row["rank"]), text))
    stages = ["before", "after", *(["promoted"] if promoted else [])]
    layers = sorted({row["layer"] for row in rows}, key=int)
    body = [
        [layer, *("\n".join(text for _, text in sorted(cells.get((layer, stage), []))) for stage in stages)]
        for layer in layers
    ]
    heads = {"before": "before the MLP", "after": "after the MLP", "promoted": "promoted by the MLP, logits"}
    note = "Most likely tokens at the last position with their probability, as final norm and unembedding read them"
    note += "; promoted: the logits that rise most from before to after." if promoted else "."
    prompt, answer = printable(rows[0]["prompt"]), printable(rows[0]["answer"])
    return [
        Text(f"Prompt: {prompt}   (answer: {answer})"),
        Table(["layer", *(heads[stage] for stage in stages)], body, words=4, file="analysis/lens.csv"),
        Text(note, "note"),
    ]


LENS = Section("lens", "Logit lens", build, "analysis", "analyze")
