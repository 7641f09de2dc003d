"""E8: heads of the operators on other formats of arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarith.reporting.experiments import transfers, words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject

TASKS = ("two_digit_sum", "decimal_sum", "year_span", "word_problem")
LISTS = ("+", "-")


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    return transfers.matrix(subject, TASKS, transfers.lists(subject, s, LISTS), s)


def short(record: Results) -> str:
    found = transfers.cells(record["results"])
    cells = [
        f"{task} {words.signed(found[task, transfers.MEAN]['relative_drop_correct'], 0)}"
        for task in record["results"]["tasks"]
    ]
    return f"under knock-out of {record['settings']['k']} heads: {', '.join(cells)}"


def section(record: Results) -> list[str]:
    results = record["results"]
    ways = "; ".join(f"{task}: {one['answers']}" for task, one in results["tasks"].items())
    return [
        transfers.HOW,
        transfers.said_of_lists(results),
        f"How answers are read: {ways}.",
        transfers.task_table(results),
        words.bullets(_reading(record)),
    ]


def _reading(record: Results) -> list[str]:
    results = record["results"]
    found, lines = transfers.cells(results), []
    for task in results["tasks"]:
        texts = [
            f"heads of {words.sign(name) if name in SIGNS else name}: {transfers.verdict(found[task, name])}"
            for name in results["lists"]
        ]
        lines.append(f"{task}: {'; '.join(texts)}.")
    return lines


EXPERIMENT = Experiment(
    name="E8",
    title="Other formats",
    question="Do the heads of single-digit sums and differences serve longer numbers, decimals, years and stories?",
    paper="multi-digit, decimals and year spans fall alike; SVAMP by 66 % (relative).",
    settings={"n": 400, "seed": 0, "k": 5, "items": 100, "draws": 40, "resamples": 2_000, "max_new_tokens": 8},
    quick={"n": 48, "items": 8, "draws": 1, "resamples": 100},
    run=run,
    short=short,
    section=section,
)
