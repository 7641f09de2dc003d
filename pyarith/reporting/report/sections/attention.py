"""Where the key heads look from the last token: by role, and over the tokens of one prompt."""

from __future__ import annotations

import numpy as np

from pyarith.reporting.report.blocks import Block, Chart, Table, Tabs, Text, label, number, printable, share
from pyarith.reporting.report.charts import Axis, Part, grid, stacked
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Rows, Source

_COLOURS = {  # stay with a role, whatever roles a task has
    "operand_a": "c1",
    "operand_b": "c5",
    "operator": "c0",
    "first": "c3",
    "special": "c4",
    "other": "c7",
}
_MORE = ("c2", "c6")


def reason(source: Source, what: str, sign: str = "") -> str:
    """Why an analysis was not done, in a line."""
    record = source.step("analysis").record
    assert record is not None
    for one in record["not_done"]:
        if (one["analysis"], one["operator"]) == (what, sign):
            return f"Not done: {printable(one['reason'])}."
    return "Not done."


def by_operator(rows: Rows) -> dict[str, Rows]:
    """Rows by their column ``operator``."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["operator"], []).append(row)
    return found


def head_name(row: dict[str, str]) -> str:
    """``2.7``."""
    return f"{row['layer']}.{row['head']}"


def _word(role: str) -> str:
    return printable(role).replace("operand_a", "operand A").replace("operand_b", "operand B").replace("_", " ")


def build(source: Source) -> list[Block]:
    step = source.step("analysis")
    masses, tokens = (by_operator(step.table(name)) for name in ("attention.csv", "attention_tokens.csv"))
    panels: dict[str, list[Block]] = {}
    for sign, title in source.titles.items():
        rows = masses.get(sign, [])
        panels[title] = _roles(title, rows) if rows else [Text(reason(source, "attention", sign))]
        if sign in tokens:
            panels[title] += _prompt(title, tokens[sign])
    return [Tabs(panels)]


def _roles(title: str, rows: Rows) -> list[Block]:
    heads = list(dict.fromkeys(map(head_name, rows)))
    roles = list(dict.fromkeys(row["role"] for row in rows))
    mass = {(head_name(row), row["role"]): number(row["mass"]) for row in rows}
    spread = {(head_name(row), row["role"]): number(row["spread"]) for row in rows}
    others = iter(_MORE * len(roles))
    parts = []
    for role in roles:
        colour = _COLOURS.get(role) or next(others)
        values = [100 * mass[head, role] for head in heads]
        if max(values) < 0.5:
            continue  # in the table, not in the legend
        word = label(_word(role))
        hover = [
            f"<b>head {head}</b>, {label(title)}<br>{word}: {share(mass[head, role])}<br>sd over prompts "
            f"{share(spread[head, role])}"
            for head in heads
        ]
        parts.append(Part(word, values, colour, hover))
    says = f"Attention of the key heads at the last token by token role, {title}, mean over the prompts."
    cells = [[head, *(f"{share(mass[head, role])} ({share(spread[head, role])})" for role in roles)] for head in heads]
    table = Table(
        ["head", *map(_word, roles)],
        cells,
        "Mean over prompts (standard deviation)",
        folded=True,
        file="analysis/attention.csv",
    )
    return [Chart(stacked(parts, Axis(heads, "head")), says), table]


def _prompt(title: str, rows: Rows) -> list[Block]:
    """The same heads over one prompt, token by token."""
    heads = list(dict.fromkeys(map(head_name, rows)))
    places = sorted({int(row["position"]) for row in rows})
    z = np.zeros((len(heads), len(places)))
    hover, texts, roles = [[""] * len(places) for _ in heads], {}, {}
    for row in rows:
        head, place = heads.index(head_name(row)), places.index(int(row["position"]))
        texts[place], roles[place] = row["text"], row["role"]
        z[head, place] = 100 * number(row["attention"])
        hover[head][place] = (
            f"<b>head {heads[head]}</b>, {label(title)}<br>token {label(repr(row['text']))}, "
            f"{label(_word(row['role']))}<br>attention {share(number(row['attention']))}"
        )
    shown = [label(printable(texts[i]).strip() or repr(texts[i]), 12) for i in range(len(places))]
    figure = grid(z, Axis(shown), Axis(heads, "head"), hover, limit=100, unit="%", sequential=True)
    prompt = printable(rows[0]["prompt"])
    cells = [
        [repr(texts[i]), _word(roles[i]), *(share(z[head, i] / 100) for head in range(len(heads)))]
        for i in range(len(places))
    ]
    columns = ["token", "role", *(f"head {head}" for head in heads)]
    file = "analysis/attention_tokens.csv"
    table = Table(columns, cells, "Token by token", words=2, folded=True, file=file)
    return [Chart(figure, f"Attention of the same heads from the last token over one prompt: {prompt}"), table]


ATTENTION = Section("attention", "Attention", build, "analysis", "analyze")
