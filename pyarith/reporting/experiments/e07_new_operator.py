"""E7: heads of the four operators on a fifth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarith import stats, tasks
from pyarith.discovery.discover import discover
from pyarith.errors import AlignmentError
from pyarith.reporting.experiments import transfers, words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject

TASK = "power"


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    heads = transfers.lists(subject, s)
    return {**transfers.matrix(subject, [TASK], heads, s), "own_heads": _own_heads(subject, heads, s)}


def _own_heads(subject: Subject, heads: Mapping[str, Any], s: Mapping[str, Any]) -> Results:
    """The new operator's own top heads, and how many it shares with each list."""
    try:
        pairs = tasks.problem_pairs(subject.tokenizer, TASK, s["n"], s["seed"], fewer=True)
    except AlignmentError as error:  # answers of several tokens
        return {"reason": str(error)}
    found = discover(subject.model, pairs, progress=False)
    own = found.result.top(s["k"])
    summary = found.summary()
    shared = {name: stats.overlap([row.head for row in own], one, subject.n_heads) for name, one in heads.items()}
    return {
        **{name: summary[name] for name in ("prompts", "accuracy", "strength")},
        "top": [{"head": str(row.head), "effect": row.effect} for row in own],
        "shared": {
            name: {"common": one.common, "expected": one.expected_common, "p": one.p} for name, one in shared.items()
        },
    }


def short(record: Results) -> str:
    found = transfers.cells(record["results"])
    drops = {name: found[TASK, name]["relative_drop_correct"] for name in record["results"]["lists"]}
    known = [one for one in drops.values() if one is not None]
    if not known:
        return f"the model never gets {TASK} right"
    k = record["settings"]["k"]
    return f"{TASK} under knock-out of {k} heads: {words.signed(min(known), 0)} to {words.signed(max(known), 0)}"


def section(record: Results) -> list[str]:
    results, own = record["results"], record["results"]["own_heads"]
    parts = [transfers.HOW, transfers.said_of_lists(results), transfers.task_table(results)]
    if "reason" in own:
        parts.append(f"Heads of {TASK} itself: not patched: {own['reason']}")
    else:
        top = ", ".join(f"{row['head']} {words.signed(row['effect'])}" for row in own["top"])
        shared = "; ".join(
            f"{words.sign(name) if name in SIGNS else name} {one['common']} (chance "
            f"{words.number(one['expected'], '.1f')}, p {words.few(one['p'])})"
            for name, one in own["shared"].items()
        )
        parts.append(
            f"Path patching on {TASK} itself ({own['prompts']} prompts, corrupted by another problem of the same form, "
            f"strength {words.number(own['strength'])}) ranks first: {top}. Shared with the lists: {shared}."
        )
    return [*parts, words.bullets(_reading(record))]


def _reading(record: Results) -> list[str]:
    found = transfers.cells(record["results"])
    names = {name: words.sign(name) if name in SIGNS else name for name in record["results"]["lists"]}
    lines = [f"Heads of {shown}: {transfers.verdict(found[TASK, name])}." for name, shown in names.items()]
    lines.append(
        "The corruption that ranked the lists replaces the operator; the new operator's own ranking swaps whole "
        "problems, so part of a difference between them is a difference of corruptions."
    )
    return lines


EXPERIMENT = Experiment(
    name="E7",
    title="A new operator",
    question="Do heads found on four operators serve a fifth, exponentiation?",
    paper="the same five heads; their knock-out costs 62 to 66 % on exponentiation.",
    settings={"n": 400, "seed": 0, "k": 5, "items": 160, "draws": 40, "resamples": 2_000, "max_new_tokens": 8},
    quick={"n": 48, "items": 16, "draws": 2, "resamples": 100},
    run=run,
    short=short,
    section=section,
)
