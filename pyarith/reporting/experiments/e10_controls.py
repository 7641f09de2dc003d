"""E10: tasks without arithmetic under the same knock-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarith import tasks
from pyarith.reporting.experiments import transfers, words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    heads = {name: one for name, one in transfers.lists(subject, s).items() if name in SIGNS}
    return transfers.matrix(subject, tasks.CONTROL_TASKS, heads, s)


def _drops(record: Results, sign: str) -> dict[str, float]:
    found = transfers.cells(record["results"])
    drops = {task: found[task, sign]["relative_drop_correct"] for task in record["results"]["tasks"]}
    return {task: drop for task, drop in drops.items() if drop is not None}


def short(record: Results) -> str:
    found, texts = transfers.cells(record["results"]), []
    for sign in record["results"]["lists"]:
        drops = _drops(record, sign)
        if drops:
            worst = min(drops, key=lambda task: drops[task])
            own = found[f"{transfers.OWN} {sign}", sign]["relative_drop_correct"]
            texts.append(
                f"{words.sign(sign)} {words.signed(own, 0)}, worst other {worst} {words.signed(drops[worst], 0)}"
            )
    return f"relative drop of the operator itself and of the most harmed other task: {'; '.join(texts)}"


def section(record: Results) -> list[str]:
    results = record["results"]
    found = transfers.cells(results)
    columns = ["task", "items", "intact", *(f"heads of {words.sign(sign)}" for sign in results["lists"])]
    rows = []
    for task, about in results["tasks"].items():
        some = [found[task, sign] for sign in results["lists"]]
        rows.append([task, str(about["items"]), words.percent(some[0]["accuracy_intact"]), *map(_cell, some)])
    own = [found[f"{transfers.OWN} {sign}", sign] for sign in results["lists"]]
    rows.append(["the operator itself", "", "", *map(_cell, own)])
    return [
        transfers.HOW,
        transfers.said_of_lists(results),
        "Accuracy with the list ablated, then the mean without as many others of the same layers / without random "
        "heads:",
        words.table(columns, rows),
        words.bullets(_reading(record)),
    ]


def _cell(row: Results) -> str:
    star = "\\*" if row["q"] is not None and row["q"] < 0.05 else ""
    others = f"{words.percent(row['same_layer_mean'], 0)} / {words.percent(row['random_mean'], 0)}"
    return f"{words.percent(row['accuracy'], 0)}{star} ({others})"


def _reading(record: Results) -> list[str]:
    results = record["results"]
    found, lines = transfers.cells(results), ["\\*: differs from the intact model, q < 0.05 (adjusted over all cells)."]
    for sign in results["lists"]:
        own = found[f"{transfers.OWN} {sign}", sign]["relative_drop_correct"]
        drops = _drops(record, sign)
        harmed = [task for task, drop in drops.items() if drop < -0.05]
        spared = [task for task in drops if task not in harmed]
        names = (f"{task} ({words.signed(drops[task], 0)})" for task in sorted(harmed, key=lambda task: drops[task]))
        special = [task for task in harmed if found[task, sign]["same_layer_p"] < 0.05]
        tail = ""
        if harmed:
            tail = (
                f"; of these {words.listing(special)} more than under other heads of the same layers (p < 0.05, not "
                "adjusted)"
                if special
                else "; none of these more than under other heads of the same layers (p < 0.05, not adjusted)"
            )
        lines.append(
            f"{words.sign(sign)}: itself {words.signed(own, 0)}; harmed by more than 5 %: {words.listing(names)}; "
            f"spared: {words.listing(spared)}{tail}."
        )
    return lines


EXPERIMENT = Experiment(
    name="E10",
    title="Tasks without arithmetic",
    question="Does the knock-out of arithmetic heads leave other tasks alone?",
    paper="MMLU-Humanities 42.9 -> 42.6.",
    settings={"n": 400, "seed": 0, "k": 5, "items": 100, "draws": 40, "resamples": 2_000, "max_new_tokens": 8},
    quick={"n": 48, "items": 8, "draws": 1, "resamples": 100},
    run=run,
    short=short,
    section=section,
)
