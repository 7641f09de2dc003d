"""E5: knock-out of the top k heads, beside controls."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith.discovery.knockout import KnockoutCurve, knockout_curve
from pyarith.errors import InputError
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import NAMES, SIGNS, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "key": "key heads",
    "key_operands": "key heads by operands swapped",
    "same_layer": "same layers",
    "random": "random",
    "bottom": "bottom k",
    "kept": "only top k kept",
}
CONTROLS = ("same_layer", "random")


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    operators: dict[str, Results] = {}
    for sign in SIGNS:
        ks = [k for k in s["ks"] if k <= subject.n_heads]
        pairs, ranking = subject.report(sign, s["n"], s["seed"]), subject.ranking(sign, s["n"], s["seed"])
        other = subject.ranking(sign, s["n"], s["seed"], "operands")
        options = {"ks": ks, "draws": s["draws"], "seed": s["seed"], "progress": False}
        try:
            found = knockout_curve(subject.model, pairs, ranking, **options)
            swapped = knockout_curve(subject.model, pairs, other, controls=(), keep=False, **options)
        except InputError as error:  # no prompt is answered rightly: nothing to knock out
            operators[sign] = {"reason": str(error)}
            continue
        operators[sign] = _curve(found)
        operators[sign]["accuracy"]["key_operands"] = swapped.arms["key"].accuracy
        operators[sign]["heads_operands"] = [str(head) for head in other[: ks[-1]]]
    return {"operators": operators}


def _curve(found: KnockoutCurve) -> Results:
    key = found.arms["key"].accuracy[0]
    scale = found.all_ablated[1] != found.clean_logit
    areas = found.areas() if scale else None
    top = [set(one.heads) for one in found.arms["key"].heads[0]]
    drawn = found.arms["same_layer"].heads
    return {
        "prompts": found.n_prompts,
        "wrong_left_out": found.n_wrong,
        "ks": found.ks,
        "heads": [str(head) for head in found.ranking[: int(found.ks[-1])]],
        "accuracy": {name: arm.accuracy for name, arm in found.arms.items()},
        "p": {
            name: (1 + (found.arms[name].accuracy <= key).sum(0)) / (1 + len(found.arms[name].accuracy))
            for name in CONTROLS
        },
        "key_heads_in_same_layer": [
            float(np.mean([len(top[i] & set(d[i].heads)) for d in drawn])) for i in range(len(key))
        ],
        "all_ablated": found.all_ablated[0],
        "faithfulness": found.faithfulness() if scale else None,
        "cpr": None if areas is None else areas.cpr,
        "cmd": None if areas is None else areas.cmd,
        "semantics": found.semantics,
    }


def _at(one: Results, s: Mapping[str, Any]) -> int:
    """Place of the k that the text speaks of: the paper's 10, or the largest below."""
    return max((i for i, k in enumerate(one["ks"]) if k <= s["k"]), default=0)


def _done(record: Results) -> dict[str, Results]:
    return {sign: one for sign, one in record["results"]["operators"].items() if "reason" not in one}


def short(record: Results) -> str:
    found, s = _done(record), record["settings"]
    if not found:
        return "no operator is answered rightly"
    cells = []
    for name in ("key", "same_layer", "random"):
        values = [float(np.mean(one["accuracy"][name], 0)[_at(one, s)]) for one in found.values()]
        cells.append(f"{ARMS[name]} {words.percent(min(values), 0)} to {words.percent(max(values), 0)}")
    k = next(iter(found.values()))["ks"][_at(next(iter(found.values())), s)]
    return f"accuracy without {k} heads, over operators: {', '.join(cells)}"


def section(record: Results) -> list[str]:
    found, s = _done(record), record["settings"]
    parts = [
        "Heads ranked on one half of the prompts, ablated on the other (no operand pair in both), initially correct "
        f"prompts only; controls: mean (least .. most) of {s['draws']} draws. *Noising*: the heads are ablated, the "
        "rest intact; *denoising*: all heads but the top k are ablated, only these are kept. *Key heads*: ranked "
        "with the operator replaced, as in the paper; beside them the heads ranked with both operands swapped.",
        *(["![Accuracy against the number of ablated heads](E5.png)"] if found else []),
    ]
    for sign, one in record["results"]["operators"].items():
        if "reason" in one:
            parts.append(f"{words.sign(sign)}: not done: {one['reason']}")
            continue
        accuracy = {name: np.array(rows) for name, rows in one["accuracy"].items()}
        rows = [
            [
                str(k),
                *(_spread(accuracy[name][:, i]) for name in ARMS if name in accuracy),
                words.few(one["p"]["same_layer"][i]),
                words.few(one["p"]["random"][i]),
            ]
            for i, k in enumerate(one["ks"])
        ]
        columns = ["k", *(ARMS[name] for name in ARMS if name in accuracy), "p, same layers", "p, random"]
        areas = (
            f"CPR {words.number(one['cpr'])}, CMD {words.number(one['cmd'])} (of the answer's logit, over heads kept)"
        )
        parts += [
            f"{words.sign(sign)}, {words.count(one['prompts'], 'prompt')} ({one['wrong_left_out']} answered wrongly "
            f"left out); order: {', '.join(one['heads'][: s['k']])}; by operands swapped "
            f"{', '.join(one['heads_operands'][: s['k']])}; all heads ablated: {words.percent(one['all_ablated'])}; "
            f"{areas}:",
            words.table(columns, rows),
        ]
    if found:
        parts.append(
            f"p = (1 + draws that harm as much or more) / (1 + draws), at least {words.few(1 / (1 + s['draws']))}, "
            f"not adjusted over k. Quantity: {next(iter(found.values()))['semantics']}."
        )
    return [*parts, words.bullets(_reading(record))]


def _spread(values: Any) -> str:
    mean = f"{100 * float(np.mean(values)):.0f} %"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.0f} .. {100 * max(values):.0f})"


def _reading(record: Results) -> list[str]:
    s, lines = record["settings"], []
    total = record["model"]["layers"] * record["model"]["heads"]
    for sign, one in _done(record).items():
        i = _at(one, s)
        k = one["ks"][i]
        mean = {name: float(np.mean(rows, 0)[i]) for name, rows in one["accuracy"].items()}
        p = one["p"]["same_layer"]
        known = [one["ks"][j] for j in range(len(p)) if p[j] < 0.05]
        verdict = (
            f"key heads harm more than heads of the same layers (p < 0.05) at k = {words.listing(known)}"
            if known
            else "at no k do key heads harm more than heads of the same layers (p < 0.05)"
        )
        shared = one["key_heads_in_same_layer"][i]
        among = (
            f" (on average {shared:.1f} of these are key heads, as the layers have no others left)" if shared else ""
        )
        lines.append(
            f"{words.sign(sign)}, k = {k}: {words.percent(mean['key'])} without the key heads, "
            f"{words.percent(mean['same_layer'])} without as many others of their layers{among}, "
            f"{words.percent(mean['random'])} without random ones; {verdict}."
        )
        swap = [float(v) for v in np.mean(one["accuracy"]["key_operands"], 0)]
        worse = [one["ks"][j] for j, v in enumerate(np.mean(one["accuracy"]["key"], 0)) if swap[j] < v]
        lines.append(
            f"{words.sign(sign)}, ranked with operands swapped: {words.percent(swap[i])} at k = {k}; more harm than "
            f"the paper's ranking at k = {words.listing(worse)}. Denoising: with only the top {k} kept "
            f"{words.percent(mean['kept'])} are right, with none {words.percent(one['all_ablated'])}."
        )
    for k in sorted({one["ks"][_at(one, s)] for one in _done(record).values()}):
        lines.append(
            f"{k} heads are {words.percent(k / total)} of this model's {total}; the paper's 10 are "
            f"{words.percent(10 / 1024)} of 1024."
        )
    return lines


def figures(record: Results) -> Mapping[str, Figure]:
    from pyarith.plots import knockout_figure

    curves = {
        f"{NAMES[sign]} {sign}": SimpleNamespace(
            ks=np.array(one["ks"]),
            arms={name: SimpleNamespace(accuracy=np.array(rows)) for name, rows in one["accuracy"].items()},
            n_prompts=one["prompts"],
            all_ablated=(one["all_ablated"], 0.0),
        )
        for sign, one in _done(record).items()
    }
    return {"E5.png": knockout_figure(curves)} if curves else {}


EXPERIMENT = Experiment(
    name="E5",
    title="Knock-out of the top k heads",
    question="Does the model need these heads, more than it needs others?",
    paper="mean-ablation of the top 10: 100 -> 30.2 %; of 10 random heads: 98.0 %.",
    settings={"n": 400, "seed": 0, "ks": [1, 2, 3, 5, 8, 10, 15, 20], "k": 10, "draws": 40},
    quick={"n": 48, "ks": [1, 3, 10], "draws": 3},
    run=run,
    short=short,
    section=section,
    figures=figures,
)
