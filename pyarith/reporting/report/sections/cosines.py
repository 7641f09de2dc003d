"""MLPs: operands in what they read, the answer in what they write."""

from __future__ import annotations

from pyarith.reporting.report.blocks import Block, Chart, Table, Tabs, Text, count, label, number, signed
from pyarith.reporting.report.charts import Line, Mark, lines, numbered
from pyarith.reporting.report.sections.attention import by_operator, reason
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Rows, Source

_CURVES = {
    "operand_a": ("cos(MLP input, operand A)", "c1", "dash", "square"),
    "operand_b": ("cos(MLP input, operand B)", "c2", "dot", "diamond"),
    "answer": ("cos(what the MLP adds, answer)", "c0", "solid", "circle"),
}


def build(source: Source) -> list[Block]:
    step = source.step("analysis")
    assert step.record is not None
    tables = by_operator(step.table("mlp.csv"))
    return [
        Tabs(
            {
                title: _panel(title, tables[sign], step.record["mlp"][sign])
                if sign in tables
                else [Text(reason(source, "mlp", sign))]
                for sign, title in source.titles.items()
            }
        )
    ]


def _panel(title: str, rows: Rows, said: dict[str, object]) -> list[Block]:
    rows = sorted(rows, key=lambda row: int(row["layer"]))
    drawn = []
    for name, (words, colour, dash, symbol) in _CURVES.items():
        mean, spread = ([number(row[column]) for row in rows] for column in (name, f"{name}_spread"))
        hover = [
            f"<b>layer {row['layer']}</b>, {label(title)}<br>{words}<br>{signed(one, 3)}, sd {sd:.3f}"
            for row, one, sd in zip(rows, mean, spread, strict=True)
        ]
        low, high = ([one + sign * sd for one, sd in zip(mean, spread, strict=True)] for sign in (-1, 1))
        drawn.append(Line(words, mean, colour, hover, low, high, dash, symbol))
    points = said["points"]
    places: dict[int, list[str]] = {}  # two points may be the same layer
    for name, layer in points.items() if isinstance(points, dict) else ():
        places.setdefault(int(layer), []).append(name)
    marks = [Mark(", ".join(names), x=layer) for layer, names in places.items()]
    figure = lines(drawn, numbered(len(rows), "layer"), y_title="cosine", marks=marks)
    at = ", ".join(f"{name} at layer {layer}" for layer, names in places.items() for name in names)
    prompts = count(int(str(said["prompts"])), "prompt")
    says = f"Cosines at the last token, {title}, mean over {prompts}; bands: one standard deviation."
    note = f"The three points of the answer's curve: {at or 'none, as it is flat'}."
    if said["several_tokens_left_out"]:
        note += f" Left out, as an operand is several tokens: {said['several_tokens_left_out']}."
    cells = [
        [row["layer"], *(f"{signed(number(row[c]), 3)} ({number(row[f'{c}_spread']):.3f})" for c in _CURVES)]
        for row in rows
    ]
    columns = ["layer", *(words for words, *_ in _CURVES.values())]
    table = Table(columns, cells, "Mean over prompts (standard deviation)", folded=True, file="analysis/mlp.csv")
    return [Chart(figure, says), Text(note), table]


COSINES = Section("cosines", "MLP cosines", build, "analysis", "analyze")
