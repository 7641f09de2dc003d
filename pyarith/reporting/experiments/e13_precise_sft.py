"""E13: tuning the key heads only, against other ways of tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyarith.reporting import comparisons
from pyarith.reporting.experiments import training, words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    parts = training.split(subject, s)
    order = training.ranking(subject, parts)
    names = list(s["arms"])
    arms, size = comparisons.usual_arms(subject.model, order, s["k"], names)
    rates = {name: s["full_rates"] if name == "full" else s["rates"] for name in names}
    found = training.run(subject, parts, arms, rates, s)
    return {**found, "heads": [str(head) for head in order[: s["k"]]], "size": size}


def short(record: Results) -> str:
    found = {one["arm"]: one for one in record["results"]["summary"]}
    cells = [
        f"{name} {words.signed(found[name]['target_change'], 0)} / {words.signed(found[name]['retention_change'], 0)}"
        for name in ("key heads", "same layers", "LoRA", "full")
        if name in found
    ]
    return f"gain on {words.sign(record['settings']['sign'])} / change of other tasks: {', '.join(cells)}"


def section(record: Results) -> list[str]:
    results, s = record["results"], record["settings"]
    return [
        f"{training.how(results, s)} The arms have {results['size']:,} parameters each, those of the {s['k']} key "
        f"heads ({', '.join(results['heads'])}), ranked on the prompts that are trained on; *full* has all.",
        training.table(results),
        "![Gain against retention of every run](E13.png)",
        words.bullets([*_reading(results), *training.failed(results)]),
    ]


def _reading(results: Results) -> list[str]:
    first, *others = results["summary"]
    better = [one for one in others if one["q"] is not None and one["q"] < 0.05 and one["difference"] > 0]
    worse = [one for one in others if one["q"] is not None and one["q"] < 0.05 and one["difference"] < 0]
    rest = [one for one in others if one not in better and one not in worse]
    lines = [
        f"On the target {first['arm']} end above {words.listing(one['arm'] for one in worse)}, below "
        f"{words.listing(one['arm'] for one in better)} (q < 0.05), and cannot be told from "
        f"{words.listing(one['arm'] for one in rest)}."
    ]
    kept = [one["arm"] for one in others if one["retention_change"] > first["retention_change"]]
    lines.append(
        f"The other tasks change by {words.signed(first['retention_change'])} with {first['arm']}; less is lost (or "
        f"more won) with {words.listing(kept)}."
    )
    beaten = [
        one["arm"]
        for one in others
        if one["target_change"] >= first["target_change"]
        and one["retention_change"] >= first["retention_change"]
        and (one["target_change"], one["retention_change"]) != (first["target_change"], first["retention_change"])
    ]
    lines.append(f"At least as good in both by the means: {words.listing(beaten)}.")
    unseen = comparisons.UNSEEN
    base = results["base"][unseen]
    changes = {one["arm"]: one["accuracies"][unseen] - base for one in results["summary"]}
    names = (f"{arm} {words.signed(value)}" for arm, value in changes.items())
    lines.append(f"Operand pairs that were not trained: {words.listing(names)}.")
    return lines


def figures(record: Results) -> Mapping[str, Figure]:
    title = f"E13: training {record['settings']['sign']}, {record['settings']['k']} heads or as many parameters"
    return {"E13.png": training.frontier(record["results"], title)}


EXPERIMENT = Experiment(
    name="E13",
    title="Precise SFT against other ways of tuning",
    question="Is tuning the key heads better than tuning as many other parameters, or all?",
    paper="GSM8K 14.6 before, 24.6 full, 27.4 precise; MMLU 46.0, 40.5, 46.4; 0.07B parameters; 3.3x faster.",
    settings={
        **training.SETTINGS,
        **{"k": 4, "arms": comparisons.ARMS, "full_rates": comparisons.RATES["full"]},
    },
    quick={**training.QUICK, "full_rates": (3e-4,), "arms": ("key heads", "same layers", "random mask", "full")},
    run=run,
    short=short,
    section=section,
    figures=figures,
)
