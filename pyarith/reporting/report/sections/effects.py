"""Heat maps of the heads and bars of the MLPs, with intervals and p-values where the run has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pyarith.reporting.report.blocks import (
    Block,
    Chart,
    Table,
    Tabs,
    Text,
    between,
    label,
    number,
    percent,
    share,
    signed,
    small,
)
from pyarith.reporting.report.charts import bars, grid, numbered, reach
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Rows, Source

_TOP = 10
_NO_HEADS, _NO_MLPS = (f"{one} were not among the senders of this run." for one in ("Heads", "MLPs"))


def sender_row(row: Mapping[str, str]) -> list[str]:
    """name, effect, interval, logit change, p, adjusted p, noise floor of a row of heads.csv or mlps.csv."""
    name = f"{row['layer']}.{row['head']}" if "head" in row else row["layer"]
    low, high = number(row.get("effect_low")), number(row.get("effect_high"))
    p, adjusted = number(row.get("p")), number(row.get("p_adjusted"))
    return [
        name,
        percent(number(row["effect"])),
        between(low, high),
        signed(number(row["logit_change"])),
        "" if math.isnan(p) else small(p),
        "" if math.isnan(adjusted) else small(adjusted),
        small(number(row["noise_floor"])),
    ]


def sender_table(
    rows: Sequence[Sequence[str]],
    what: str,
    title: str,
    *,
    first: Sequence[str] = (),
    words: int = 1,
    folded: bool = False,
    file: str = "",
) -> Table:
    """Rows of ``sender_row``, without the columns that are empty in all of them."""
    columns = [*first, what, "effect", "interval", "change in logits", "p", "adjusted p", "noise floor, logits"]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    return Table([columns[i] for i in kept], cells, title, words=words, folded=folded, file=file)


def _hover(title: str, what: str, row: Mapping[str, str], level: float) -> str:
    name, effect, interval, change, _, adjusted, floor = sender_row(row)
    lines = [f"<b>{what} {name}</b>, {label(title)}", f"effect {effect}"]
    lines += [f"{100 * level:g}% interval {interval}"] if interval else []
    lines += [f"{change} logits"]
    lines += [f"adjusted p {adjusted}"] if adjusted else []
    return "<br>".join([*lines, f"noise floor {floor} logits"])


def _level(source: Source, sign: str) -> float:
    return float(source.run.record["runs"][sign].get("confidence", {}).get("level", math.nan))


def _layers(source: Source, sign: str, rows: Rows) -> int:
    """Of the model where the run says it."""
    said = source.run.record["runs"][sign]["patching"].get("n_layers")
    return int(said) if said is not None else 1 + max(int(row["layer"]) for row in rows)


def heads(source: Source) -> list[Block]:
    tables = {sign: source.table(sign, "heads.csv") for sign in source.run.signs}
    limit = reach(*([100 * number(row["effect"]) for row in rows] for rows in tables.values()))
    panels = {
        source.titles[sign]: _head_panel(source, sign, rows, limit) if rows else [Text(_NO_HEADS)]
        for sign, rows in tables.items()
    }
    return [Tabs(panels)]


def _head_panel(source: Source, sign: str, rows: Rows, limit: float) -> list[Block]:
    title, level = source.titles[sign], _level(source, sign)
    layers, across = _layers(source, sign, rows), 1 + max(int(row["head"]) for row in rows)
    z, hover = np.full((layers, across), np.nan), [[""] * across for _ in range(layers)]
    for row in rows:
        at = int(row["layer"]), int(row["head"])
        z[at] = 100 * number(row["effect"])
        hover[at[0]][at[1]] = _hover(title, "head", row, level)
    keys = [(int(row["layer"]), int(row["head"])) for row in rows if row["key"] == "1"]
    figure = grid(
        z, numbered(across, "head"), numbered(layers, "layer"), hover, limit=limit, unit="%", outlined=keys, text=_cell
    )
    threshold = share(source.run.record["runs"][sign]["summary"]["threshold"], 0)
    says = (
        f"Effect of every head on the logit of the right answer, {title}, in percent; red lowers it. Outlined: below "
        f"{threshold}. All operators share one scale."
    )
    file, cells = source.file(sign, "heads.csv"), [sender_row(row) for row in rows]
    every = [sender_table(cells, "head", f"All {len(rows)} heads", folded=True, file=file)] if len(rows) > _TOP else []
    return [Chart(figure, says), sender_table(cells[:_TOP], "head", "The most negative effects", file=file), *every]


def _cell(value: float) -> str:
    """No digits for what is next to nothing, so that the large ones stand out."""
    return "" if abs(value) < 0.5 else f"{value:.0f}" if abs(value) >= 9.5 else f"{value:.1f}"


def mlps(source: Source) -> list[Block]:
    panels: dict[str, list[Block]] = {}
    for sign in source.run.signs:
        title, level = source.titles[sign], _level(source, sign)
        rows = sorted(source.table(sign, "mlps.csv"), key=lambda row: int(row["layer"]))
        if not rows:
            panels[title] = [Text(_NO_MLPS)]
            continue
        effect, low, high = (
            [100 * number(row.get(name)) for row in rows] for name in ("effect", "effect_low", "effect_high")
        )
        hover = [_hover(title, "MLP", row, level) for row in rows]
        sure = not np.isnan(low).all()
        edges = {"low": low, "high": high} if sure else {}
        figure = bars(effect, numbered(len(rows), "layer"), hover, unit="%", **edges)
        says = f"Effect of every MLP on the logit of the right answer, {title}, in percent"
        says += f", with {100 * level:g}% intervals." if sure else "; no intervals were computed."
        cells = [sender_row(row) for row in rows]
        panels[title] = [Chart(figure, says), sender_table(cells, "layer", "", file=source.file(sign, "mlps.csv"))]
    return [Tabs(panels)]


HEADS = Section("heads", "Heads", heads)
MLPS = Section("mlps", "MLPs", mlps)
