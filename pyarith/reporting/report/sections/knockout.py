"""Knock-out curves with the range of every control."""

from __future__ import annotations

from typing import Any

from pyarith.reporting.report.blocks import Block, Chart, Table, Tabs, Text, count, label, percent, share, signed
from pyarith.reporting.report.charts import Axis, Line, Mark, lines
from pyarith.reporting.report.sections.provenance import flat
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source

_ARMS = {  # name, colour, dash, symbol
    "key": ("key heads (top k)", "c0", "solid", "circle"),
    "random": ("random heads", "c1", "solid", "triangle-up"),
    "same_layer": ("random heads of the same layers", "c3", "solid", "square"),
    "bottom": ("bottom k", "c7", "solid", "triangle-down"),
    "kept": ("all but the top k (only they are kept)", "c4", "dash", "diamond"),
}


def build(source: Source) -> list[Block]:
    record = source.step("knockout").record
    assert record is not None
    panels = {source.titles[sign]: _panel(source.titles[sign], one) for sign, one in record["curves"].items()}
    left = [source.titles[sign] for sign in source.run.signs if sign not in record["curves"]]
    none = f"Not in this step, as no head lies below {record['settings']['threshold']:.0%}: {', '.join(left)}."
    return [Tabs(panels), *([Text(none, "note")] if left else [])]


def _panel(title: str, curve: dict[str, Any]) -> list[Block]:
    rows = curve["rows"]
    ks = sorted({row["k"] for row in rows})
    found = {name: sorted((r for r in rows if r["arm"] == name), key=lambda r: r["k"]) for name in _ARMS}
    drawn = []
    for name, (words, colour, dash, symbol) in _ARMS.items():
        own = found[name]
        if not own:
            continue
        several = max(row["draws"] for row in own) > 1
        low, high = ([100 * row[edge] for row in own] for edge in ("accuracy_min", "accuracy_max"))
        drawn.append(
            Line(
                words,
                [100 * row["accuracy"] for row in own],
                colour,
                [_hover(title, words, row) for row in own],
                low if several else None,
                high if several else None,
                dash,
                symbol,
            )
        )
    everything = curve["all_ablated"]
    mark = Mark("all heads ablated", y=100 * everything["accuracy"])
    axis = Axis([str(k) for k in ks], "k, number of heads")
    figure = lines(drawn, axis, y_title="accuracy", unit="%", y_range=(-4, 104), marks=[mark])
    says = (
        f"Accuracy of {title} against the number of ablated heads, on {count(curve['prompts'], 'prompt')} that the "
        "intact model answers rightly. Lines: mean over draws; bands: worst to best draw."
    )
    cells = [
        [
            _ARMS[row["arm"]][0],
            str(row["k"]),
            str(row["draws"]),
            share(row["accuracy"]),
            f"{share(row['accuracy_min'])} .. {share(row['accuracy_max'])}",
            share(row["accuracy_sd"]),
            percent(row["accuracy"] - 1.0),
            signed(row["logit"]),
        ]
        for own in found.values()
        for row in own
    ]
    columns = ["ablated", "k", "draws", "accuracy", "worst .. best", "sd", "relative drop", "answer logit"]
    table = Table(columns, cells, f"All {len(cells)} points", folded=True, file="knockout/knockout.csv")
    settings = {"prompts": curve["drawn"], **curve["settings"]}
    how = Table(["setting", "value"], list(flat(settings)), "How it was measured", words=2, folded=True)
    return [Chart(figure, says), Text(_words(curve), "note"), table, how]


def _hover(title: str, words: str, row: dict[str, Any]) -> str:
    lines = [f"<b>{words}</b>, k = {row['k']}, {label(title)}", f"accuracy {share(row['accuracy'])}"]
    if row["draws"] > 1:
        edges = f"{share(row['accuracy_min'])} .. {share(row['accuracy_max'])}"
        lines.append(f"{edges} over {row['draws']} draws, sd {share(row['accuracy_sd'])}")
    return "<br>".join([*lines, f"relative drop {percent(row['accuracy'] - 1.0)}", f"logit {signed(row['logit'])}"])


def _words(curve: dict[str, Any]) -> str:
    """What was measured, on which prompts, and the numbers that are no curve."""
    drawn, everything = curve["drawn"], curve["all_ablated"]
    words = [f"Quantity: {curve['semantics']}."]
    words.append(
        f"Prompts answered wrongly and left out: {curve['wrong_left_out']}; sharing an operand pair with the prompts "
        f"that ranked the heads: {drawn['operand_pair_in_run']}."
    )
    words.append(
        f"Intact: answer logit {signed(curve['clean_logit'])}. All heads ablated: accuracy "
        f"{share(everything['accuracy'])}, logit {signed(everything['logit'])}."
    )
    if "areas" in curve:
        words.append(f"Areas over heads: CPR {curve['areas']['cpr']:.3f}, CMD {curve['areas']['cmd']:.3f}.")
    return " ".join(words)


KNOCKOUT = Section("knockout", "Knock-outs", build, "knockout", "knockout")
