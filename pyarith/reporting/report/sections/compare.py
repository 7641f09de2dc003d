"""Ways of training side by side: gain against retention."""

from __future__ import annotations

from typing import Any

from pyarith.reporting.report.blocks import (
    Block,
    Chart,
    Table,
    Text,
    between,
    count,
    label,
    number,
    operator_title,
    percent,
    printable,
    share,
    small,
)
from pyarith.reporting.report.charts import Cloud, scatter
from pyarith.reporting.report.sections.provenance import flat
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source

_SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "diamond", "x", "cross", "star")


def build(source: Source) -> list[Block]:
    record = source.step("compare").record
    assert record is not None
    found, settings = record["comparison"], record["settings"]
    clouds = [_cloud(found, one, place) for place, one in enumerate(found["summary"])]
    figure = scatter(clouds, x_title="gain on the target", y_title="change of the other tasks", unit="%")
    says = (
        f"Training {operator_title(settings['operator'])}: change of the target's accuracy against change of the mean "
        f"of {count(len(found['retention']), 'other task')}, in percentage points. Filled: runs at an arm's best "
        "learning rate, large: their mean; hollow: other rates, of which some may lie outside (double-click shows all)."
    )
    kept = ", ".join(printable(name) for name in found["retention"])
    about = f"Other tasks: {kept}. Rates were chosen on {found['prompts']['validation']} prompts of their own."
    how = list(flat({"prompts": found["prompts"], "settings": found["settings"]}))
    return [
        Chart(figure, says),
        Text(about, "note"),
        _arms(found),
        _runs(found),
        Table(["setting", "value"], how, "How it was measured", words=2, folded=True),
    ]


def _cloud(found: dict[str, Any], one: dict[str, Any], place: int) -> Cloud:
    points = [point for point in found["frontier"] if point["arm"] == one["arm"]]
    hover = [
        f"<b>{label(point['arm'])}</b>, rate {point['rate']:g}, seed {point['seed']}<br>"
        f"gain {percent(point['gain'])}, other tasks {percent(point['retention'])}"
        for point in points
    ]
    return Cloud(
        label(one["arm"]),
        [100 * point["gain"] for point in points],
        [100 * point["retention"] for point in points],
        [point["rate"] == one["rate"] for point in points],
        f"c{place % len(_SYMBOLS)}",
        _SYMBOLS[place % len(_SYMBOLS)],
        hover,
    )


def _arms(found: dict[str, Any]) -> Table:
    first = found["summary"][0]["arm"]
    rows = [
        [
            printable(one["arm"]),
            f"{one['rate']:g}{' (edge)' if one['at_edge'] else ''}",
            f"{one['n_parameters']:,}",
            share(one["target"]),
            percent(one["target_change"]),
            percent(one["retention_change"]),
            percent(number(one["difference"])),
            between(number(one["low"]), number(one["high"])),
            small(number(one["q"])),
        ]
        for one in found["summary"]
    ]
    columns = ["arm", "rate", "parameters", "target", "gain", "other tasks", f"target - {first}", "interval", "q"]
    return Table(columns, rows, "Every arm at its best rate; (edge): lowest or highest of its sweep")


def _runs(found: dict[str, Any]) -> Table:
    rows = [
        [printable(one["arm"]), f"{one['rate']:g}", str(one["seed"]), percent(one["gain"]), percent(one["retention"])]
        for one in found["frontier"]
    ]
    columns = ["arm", "rate", "seed", "gain", "other tasks"]
    return Table(columns, rows, f"All {len(rows)} runs", folded=True, file="compare/runs.csv")


COMPARE = Section("compare", "Ways of training", build, "compare", "compare")
