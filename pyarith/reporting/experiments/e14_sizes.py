"""E14: how many heads are tuned; and E15: MLPs beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyarith.reporting.experiments import training, words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import Subject
from pyarith.tuning.arms import head_arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_heads(subject: Subject, s: Mapping[str, Any]) -> Results:
    parts = training.split(subject, s)
    order = training.ranking(subject, parts)
    ks = [k for k in s["ks"] if k <= len(order)]
    arms = [head_arm(words.count(k, "head"), lambda seed, k=k: order[:k]) for k in ks]  # type: ignore[misc]
    found = training.run(subject, parts, arms, {arm.name: s["rates"] for arm in arms}, s)
    return {**found, "order": [str(head) for head in order[: ks[-1]]]}


def run_mlps(subject: Subject, s: Mapping[str, Any]) -> Results:
    parts = training.split(subject, s)
    order = training.ranking(subject, parts)
    heads = order[: s["k"]]
    last = subject.identity["layers"] - 1
    # from the highest layer with a chosen head on: there the paper finds the MLPs that make the answer
    first = min(max(head.layer for head in heads), last)
    rising = [*range(first, last + 1), *range(first - 1, -1, -1)]
    arms = [
        head_arm(
            f"{words.count(len(heads), 'head')} + {words.count(number, 'MLP')}",
            lambda seed: heads,
            sorted(rising[:number]),
        )
        for number in s["mlps"]
        if number <= len(rising)
    ]
    found = training.run(subject, parts, arms, {arm.name: s["rates"] for arm in arms}, s)
    return {**found, "heads": [str(head) for head in heads], "layers": rising}


def short(record: Results) -> str:
    cells = [
        f"{one['arm']} {words.signed(one['target_change'], 0)} / {words.signed(one['retention_change'], 0)}"
        for one in record["results"]["summary"]
    ]
    return f"gain on {words.sign(record['settings']['sign'])} / change of other tasks: {', '.join(cells)}"


def _section(record: Results, picture: str, about: str) -> list[str]:
    results = record["results"]
    best = max(results["summary"], key=lambda one: one["target"])
    most = max(results["summary"], key=lambda one: one["retention"])
    lines = [
        f"Highest on the target: {best['arm']} ({words.percent(best['target'])}); on the other tasks: {most['arm']} "
        f"({words.percent(most['retention'])}).",
        *training.failed(results),
    ]
    return [
        f"{training.how(results, record['settings'])} {about}",
        training.table(results),
        f"![Gain against retention of every run]({picture})",
        words.bullets(lines),
    ]


def section_heads(record: Results) -> list[str]:
    return _section(record, "E14.png", f"Heads in the order {', '.join(record['results']['order'])}.")


def section_mlps(record: Results) -> list[str]:
    results = record["results"]
    about = (
        f"Heads {', '.join(results['heads'])}; MLPs in the order of layers {', '.join(map(str, results['layers']))}."
    )
    return _section(record, "E15.png", about)


def figures_heads(record: Results) -> Mapping[str, Figure]:
    return {"E14.png": training.frontier(record["results"], f"E14: training {record['settings']['sign']}")}


def figures_mlps(record: Results) -> Mapping[str, Figure]:
    return {"E15.png": training.frontier(record["results"], f"E15: training {record['settings']['sign']}")}


HEADS = Experiment(
    name="E14",
    title="How many heads are tuned",
    question="Does tuning more heads help?",
    paper="GSM8K with 8, 16, 32, 48, 64 heads: 25.4, 26.5, 27.4, 27.4, 27.3.",
    settings={**training.SETTINGS, "ks": (1, 2, 4, 8, 16)},
    quick={**training.QUICK, "ks": (1, 4)},
    run=run_heads,
    short=short,
    section=section_heads,
    figures=figures_heads,
)

MLPS = Experiment(
    name="E15",
    title="MLPs tuned beside the heads",
    question="What do MLPs add, and what do they cost?",
    paper="heads plus 1, 3, 6, all MLPs: GSM8K 27.5, 28.0, 28.2, 29.2; MMLU 46.0, 45.2, 44.9, 43.9.",
    settings={**training.SETTINGS, "k": 4, "mlps": (0, 1, 3, 6)},
    quick={**training.QUICK, "k": 4, "mlps": (0, 1)},
    run=run_mlps,
    short=short,
    section=section_mlps,
    figures=figures_mlps,
)
