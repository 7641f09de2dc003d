"""What the experiments on training share: one operator, its heads, the runs, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyarith.discovery.discover import discover
from pyarith.reporting import comparisons
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Results
from pyarith.reporting.experiments.subject import Subject, mean_effects, relative_effects
from pyarith.reporting.saved import ranking_of
from pyarith.tuning.arms import Arm
from pyarith.tuning.compare import compare
from pyarith.tuning.settings import TuneSettings
from pyarith.types import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS: dict[str, Any] = {
    **{"sign": "/", "n": 1200, "seed": 0, "items": 40, "seeds": 3, "epochs": 2, "batch_size": 16},
    "rates": comparisons.RATES["key heads"],
}
QUICK: dict[str, Any] = {"n": 160, "items": 4, "seeds": 1, "epochs": 1, "rates": (3e-3,)}


def split(subject: Subject, s: Mapping[str, Any]) -> comparisons.Split:
    """The prompts of an experiment, divided."""
    retention = comparisons.usual_retention(subject.tokenizer, s["sign"])
    return comparisons.split_task(
        subject.tokenizer, s["sign"], n=s["n"], seed=s["seed"], retention=retention, items=s["items"]
    )


def ranking(subject: Subject, parts: comparisons.Split) -> tuple[Head, ...]:
    """All heads by their effect on the prompts that are trained on, so that no reported prompt chose a head."""
    return ranking_of(mean_effects(relative_effects(discover(subject.model, parts.train, progress=False))))


def run(
    subject: Subject,
    parts: comparisons.Split,
    arms: Sequence[Arm],
    rates: Mapping[str, Sequence[float]],
    s: Mapping[str, Any],
) -> Results:
    """All runs of an experiment as numbers."""
    found = compare(
        subject.model,
        parts.examples(subject.tokenizer),
        arms,
        parts.score(),
        target=comparisons.TARGET,
        validation=comparisons.VALIDATION,
        retention=list(parts.retention),
        clusters=parts.tests[comparisons.TARGET],
        rates=rates,
        seeds=range(s["seeds"]),
        settings=TuneSettings(epochs=s["epochs"], batch_size=s["batch_size"], micro_batch_size=s["batch_size"]),
    )
    return comparisons.comparison_record(found, found.summary(seed=s["seed"]), parts)


def table(results: Results) -> str:
    """One row an arm at its best rate."""
    first = results["summary"][0]["arm"]
    columns = ["arm", "parameters", "rate", "target", "gain", "unseen pairs", "other tasks", f"target against {first}"]
    base = results["base"]
    kept = sum(base[name] for name in results["retention"]) / len(results["retention"])
    start = ["untrained", "", "", words.percent(base[results["target"]]), ""]
    rows = [[*start, words.percent(base[comparisons.UNSEEN]), words.percent(kept), ""]]
    for one in results["summary"]:
        edge = "\\*" if one["at_edge"] else ""
        against = "" if one["arm"] == first else f"{words.signed(one['difference'])} ({_interval(one)}), q {_q(one)}"
        low, high = one["target_range"]
        target = f"{words.percent(one['target'])} ({100 * low:.0f} .. {100 * high:.0f})"
        unseen = words.percent(one["accuracies"][comparisons.UNSEEN])
        others = f"{words.percent(one['retention'])} ({words.signed(one['retention_change'])})"
        size = f"{one['n_parameters']:,}"
        rows.append(
            [
                one["arm"],
                size,
                f"{one['rate']:g}{edge}",
                target,
                words.signed(one["target_change"]),
                unseen,
                others,
                against,
            ]
        )
    return words.table(columns, rows)


def _interval(one: Results) -> str:
    return words.interval(one["low"], one["high"])


def _q(one: Results) -> str:
    return words.few(one["q"])


def how(results: Results, s: Mapping[str, Any]) -> str:
    """How the runs were made, in words."""
    sizes = results["prompts"]
    return (
        f"Trained on {sizes['train']} prompts of {words.sign(s['sign'])} for {words.count(s['epochs'], 'epoch')}, "
        f"batches of {s['batch_size']}, the same data order for every arm, {words.count(s['seeds'], 'seed')}. "
        f"*Target*: {sizes['target']} prompts with trained operand pairs in templates that were not trained; *unseen "
        f"pairs*: {sizes['unseen pairs']} prompts with other operand pairs; *other tasks*: mean accuracy on "
        f"{len(results['retention'])} tasks ({words.listing(map(words.sign, results['retention']))}). Every arm has "
        f"its own sweep of learning rates, of which the best on {sizes['validation']} other prompts is shown (\\*: "
        "at the edge of its sweep). Ranges are over seeds; intervals and q (adjusted over the arms) are paired, by "
        "operand pairs and templates."
    )


def failed(results: Results) -> list[str]:
    """Lines about runs without a result."""
    return [
        f"{one['arm']}, rate {one['rate']:g}, seed {one['seed']}: the loss was not finite." for one in results["failed"]
    ]


def frontier(results: Results, title: str) -> Figure:
    """Gain against retention of all runs."""
    from pyarith.plots import frontier_figure

    return frontier_figure(results["frontier"], {one["arm"]: one["rate"] for one in results["summary"]}, title)
