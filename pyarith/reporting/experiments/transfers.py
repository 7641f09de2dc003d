"""What E7, E8 and E10 share: frozen lists of heads, applied to tasks they were not chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyarith import evaluation
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Results
from pyarith.reporting.experiments.subject import SIGNS, Subject
from pyarith.reporting.saved import ranking_of
from pyarith.types import Head

MEAN = "all four"
OWN = "own"  # the task "own X" is operator X on the prompts that did not rank the heads


def lists(subject: Subject, s: Mapping[str, Any], signs: Sequence[str] = SIGNS) -> dict[str, list[Head]]:
    """The top k heads of each operator, and of the mean effect over the four, on the selecting prompts."""
    k = min(s["k"], subject.n_heads)
    found = {sign: list(subject.ranking(sign, s["n"], s["seed"])[:k]) for sign in signs}
    effects = np.mean([np.nan_to_num(subject.chosen_effects(sign, s["n"], s["seed"])) for sign in SIGNS], 0)
    return found | {MEAN: list(ranking_of(effects)[:k])}


def matrix(subject: Subject, tasks: Sequence[str], heads: Mapping[str, Any], s: Mapping[str, Any]) -> Results:
    """Tasks by lists. Every list is also applied to the reporting prompts of its own operator, for comparison."""
    own = {f"{OWN} {sign}": subject.report(sign, s["n"], s["seed"]) for sign in heads if sign in SIGNS}
    given = {name: evaluation.named_task(subject.tokenizer, name, s["items"], s["seed"]) for name in tasks}
    options = {"draws": s["draws"], "seed": s["seed"], "max_new_tokens": s["max_new_tokens"], "progress": False}
    found = evaluation.transfer(subject.model, subject.tokenizer, given, heads, resamples=s["resamples"], **options)
    rows = found.rows()
    for task, pairs in own.items():
        sign = task.removeprefix(f"{OWN} ")
        one = evaluation.transfer(
            subject.model, subject.tokenizer, {task: pairs}, {sign: heads[sign]}, resamples=s["resamples"], **options
        )
        rows += one.rows()
    return {
        "lists": {name: [str(head) for head in one] for name, one in heads.items()},
        "rows": [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in rows],
        "tasks": {
            name: {"items": one["items"], "answers": one["answers"]} for name, one in found.settings["tasks"].items()
        },
        "never_right": list(found.never_right),
    }


_LEFT_OUT = ("p_mcnemar", "random_relative_drop", "same_layer_relative_drop", "lost", "gained")


def cells(results: Results) -> dict[tuple[str, str], Results]:
    """(task, list) -> row."""
    return {(row["task"], row["heads"]): row for row in results["rows"]}


def said_of_lists(results: Results) -> str:
    """The lists in words."""
    texts = [f"{_name(name)} {', '.join(heads)}" for name, heads in results["lists"].items()]
    return f"Lists: {'; '.join(texts)}."


def _name(name: str) -> str:
    return words.sign(name) if name in SIGNS else name


def task_table(results: Results) -> str:
    """One row per task and list: accuracies, relative drop with interval, controls."""
    rows = [
        [
            f"{words.sign(row['task'].removeprefix(f'{OWN} '))} itself" if row["task"].startswith(OWN) else row["task"],
            _name(row["heads"]),
            f"{row['n']}",
            words.percent(row["accuracy_intact"]),
            words.percent(row["accuracy"]),
            words.signed(row["relative_drop_correct"], 0),
            words.interval(row["low"], row["high"], 0),
            words.few(row["q"]),
            *(
                f"{words.percent(row[f'{arm}_mean'], 0)} ({100 * row[f'{arm}_min']:.0f} .. "
                f"{100 * row[f'{arm}_max']:.0f}; p {words.few(row[f'{arm}_p'])})"
                for arm in ("same_layer", "random")
            ),
        ]
        for row in results["rows"]
    ]
    columns = [
        *("task", "heads of", "items", "intact", "ablated", "relative drop", "95 % of the difference", "q"),
        *("same-layer heads", "random heads"),
    ]
    return words.table(columns, rows)


def verdict(row: Results) -> str:
    """How a list compares with other heads of its layers on one task."""
    if row["relative_drop_correct"] is None:
        return "the intact model is never right"
    drop = words.signed(row["relative_drop_correct"], 0)
    other = words.signed(row["same_layer_relative_drop_correct"], 0)
    if row["same_layer_p"] < 0.05:
        return f"{drop}, more than with other heads of the same layers ({other}, p {words.few(row['same_layer_p'])})"
    return (
        f"{drop}, not clearly more than with other heads of the same layers ({other}, p "
        f"{words.few(row['same_layer_p'])})"
    )


HOW = (
    "Lists are frozen: ranked on the selecting half of each operator's prompts (operator replaced), then ablated "
    "(mean over all positions of the task's own prompts) on items of other tasks. Relative drop: over items that the "
    "intact model gets right. The interval is of the difference of accuracies; q is its p adjusted over all tasks and "
    "lists (of an operator itself: p). Controls: accuracy, mean (least .. most) of the draws."
)
