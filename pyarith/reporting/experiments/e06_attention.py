"""E6: where key heads look from the last token."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith import analysis
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import NAMES, SIGNS, Subject
from pyarith.types import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLES = ("operand_a", "operand_b", "operator", "first", "other")
FAMILIES = ("operator", "operands")


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    operators = {}
    every = [Head(i, j) for i in range(subject.identity["layers"]) for j in range(subject.identity["heads"])]
    for sign in SIGNS:
        effects = {c: subject.chosen_effects(sign, s["n"], s["seed"], c) for c in FAMILIES}
        below = {head for one in effects.values() for head in every if one[head] < s["threshold"]}
        strongest = {subject.ranking(sign, s["n"], s["seed"], c)[0] for c in FAMILIES}
        heads = sorted(below or strongest, key=lambda head: min(float(one[head]) for one in effects.values()))[
            : s["most"]
        ]
        pairs = subject.report(sign, s["n"], s["seed"])
        found = analysis.attention_mass(subject.model, pairs, every)
        at = [found.roles.index(role) for role in ROLES]
        mean, tokens = found.mean[:, at], found.role_tokens[:, at]
        operators[sign] = {
            "prompts": len(pairs),
            "check_error": found.check_error,
            "roles": list(ROLES),
            "uniform": (tokens / found.role_tokens.sum(1, keepdims=True)).mean(0),
            "all_heads": mean.mean(0),
            "heads": [
                {
                    "head": str(head),
                    "key": head in below,
                    "effects": {c: one[head] for c, one in effects.items()},
                    "mass": mean[every.index(head)],
                }
                for head in heads
            ],
        }
    return {"operators": operators}


def kind(head: Results, one: Results) -> str:
    """Operand head, operator head, or neither: where it looks more than twice as much as even attention would."""
    mass, even = (dict(zip(one["roles"], values, strict=True)) for values in (head["mass"], one["uniform"]))
    looks = [role for role in ROLES[:3] if mass[role] > 2 * even[role]]
    names = {"operand_a": "operand A", "operand_b": "operand B", "operator": "operator"}
    return words.listing((names[role] for role in looks), none="neither operands nor operator")


def short(record: Results) -> str:
    cells = []
    for sign, one in record["results"]["operators"].items():
        best = one["heads"][0]
        cells.append(f"{words.sign(sign)} {best['head']}: {kind(best, one)}")
    return f"strongest head looks at: {'; '.join(cells)}"


def section(record: Results) -> list[str]:
    rows = []
    for sign, one in record["results"]["operators"].items():
        for head in one["heads"]:
            rows.append(
                [
                    words.sign(sign),
                    head["head"] if head["key"] else f"{head['head']} (not key)",
                    *(words.signed(head["effects"][c]) for c in FAMILIES),
                    *(words.percent(value, 0) for value in head["mass"]),
                    kind(head, one),
                ]
            )
        for name, label in (("all_heads", "mean of all heads"), ("uniform", "even attention")):
            rows.append([words.sign(sign), label, "", "", *(words.percent(value, 0) for value in one[name]), ""])
    columns = [
        *("operator", "head", "effect, operator replaced", "effect, operands swapped"),
        *("A", "B", "operator", "first token", "other", "looks at"),
    ]
    errors = [one["check_error"] for one in record["results"]["operators"].values()]
    return [
        f"Heads below {words.signed(record['settings']['threshold'], 0)} on the selecting half of the prompts under "
        f"either corruption (at most {record['settings']['most']}; where there are none, the strongest); attention on "
        "the other half, mean share of the last token's attention by role. *Even attention*: the share of the "
        f"prompt's tokens. Attention rows reproduce the heads' outputs to {max(errors):.0e}.",
        "![Attention of key heads](E6.png)",
        words.table(columns, rows),
        words.bullets(_reading(record)),
    ]


def _reading(record: Results) -> list[str]:
    lines = []
    for sign, one in record["results"]["operators"].items():
        keys = [head for head in one["heads"] if head["key"]]
        looking = [head for head in keys if kind(head, one) != "neither operands nor operator"]
        aside = [head["head"] for head in keys if head not in looking]
        lines.append(
            f"{words.sign(sign)}: {len(looking)} of {words.count(len(keys), 'key head')} look at an operand or the "
            "operator more than twice as much as even attention "
            f"would{f'; not so {words.listing(aside)}' if aside else ''}."
        )
    lines.append(
        "Attention shows where a head can read from, not what it carries: earlier layers may have moved an operand's "
        "value to another token, such as one behind it."
    )
    return lines


def figures(record: Results) -> Mapping[str, Figure]:
    from pyarith.plots import attention_figure

    masses = {
        f"{NAMES[sign]} {sign}": SimpleNamespace(
            heads=[head["head"] for head in one["heads"]],
            roles=one["roles"],
            mean=np.array([head["mass"] for head in one["heads"]]),
        )
        for sign, one in record["results"]["operators"].items()
    }
    return {"E6.png": attention_figure(masses)}


EXPERIMENT = Experiment(
    name="E6",
    title="Attention of key heads",
    question="Which tokens do key heads look at from the last token?",
    paper="operand heads 13.11, 12.22 and 15.15, operator heads 14.2 and 11.8.",
    settings={"n": 400, "seed": 0, "threshold": -0.05, "most": 6},
    quick={"n": 48},
    run=run,
    short=short,
    section=section,
    figures=figures,
)
