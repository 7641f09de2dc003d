"""E1: path patching of all heads, per operator, prompt style and corruption family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith import stats
from pyarith.errors import InputError
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import NAMES, SIGNS, Subject, mean_effects, relative_effects
from pyarith.reporting.judgement import judge
from pyarith.result import PatchResult
from pyarith.tasks import CORRUPTIONS, STYLES
from pyarith.types import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILY = {
    "operator": "operator replaced by a null word",
    "operand_a": "operand A swapped",
    "operand_b": "operand B swapped",
    "operands": "both operands swapped",
}


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    operators = {}
    for sign in SIGNS:
        families = {}
        sure = {c: subject.confidence(sign, s["n"], s["seed"], c, s["resamples"]) for c in CORRUPTIONS}
        for corruption in CORRUPTIONS:
            found = subject.discovery(sign, s["n"], s["seed"], corruption)
            families[corruption] = _family(found.result, found.summary(s["threshold"]), sure[corruption], s)
        typed = stats.head_types({c: one.heads for c, one in sure.items()}, threshold=s["threshold"], alpha=s["alpha"])
        operators[sign] = {
            "families": families,
            "styles": {style: _style(subject, sign, style, s) for style in STYLES},
            "types": {
                str(Head(int(i), int(j))): {"type": str(typed.labels[i, j]), "clear": bool(typed.clear[i, j])}
                for i, j in np.argwhere(typed.labels != "none")
            },
            "stability": _stability(subject, sign, s),
            "effects": subject.discovery(sign, s["n"], s["seed"]).result.head_effects,
        }
    return {"operators": operators}


def _family(result: PatchResult, summary: dict[str, Any], sure: stats.Confidence, s: Mapping[str, Any]) -> Results:
    names = ("prompts", "accuracy", "corrupted_still_correct", "p_clean", "p_corrupted", "strength", "ratio_excluded")
    heads = sure.heads
    assert heads is not None
    certain = sure.key_heads(s["threshold"], s["alpha"])
    found = result.key_heads(s["threshold"]) or [row.head for row in result.top(1)]
    return {
        **{name: summary[name] for name in (*names, "noise_floor", "verification_error")},
        "left_out": summary["misaligned_left_out"],
        "below": len(result.key_heads(s["threshold"])),
        "certain": len(certain),
        "share": len(result.key_heads(s["threshold"])) / heads.estimate.size,
        "method": sure.method,
        "heads": [
            {
                "head": str(head),
                "effect": heads.estimate[head],
                "low": heads.low[head],
                "high": heads.high[head],
                "p_adjusted": heads.p_adjusted[head],
                "certain": head in certain,
            }
            for head in found
        ],
    }


def _style(subject: Subject, sign: str, style: str, s: Mapping[str, Any]) -> Results:
    """One prompt style out of the same result; reasons in place of numbers where it has too few prompts."""
    pairs, found = subject.pairs(sign, s["n"], s["seed"]), subject.discovery(sign, s["n"], s["seed"])
    rows = np.flatnonzero(pairs.strata["style"] == style)
    base = {
        "prompts": len(rows),
        "strength": float(found.result.corruption_strength[rows].mean()) if len(rows) else None,
    }
    try:
        effects = relative_effects(found)[..., rows]
        sure = stats.confidence(effects, None, pairs.subset(rows), resamples=s["resamples"], seed=s["seed"])
    except InputError as error:
        return base | {"reason": str(error)}
    heads = sure.heads
    assert heads is not None
    below = np.argwhere(heads.estimate < s["threshold"])
    keys = sorted((Head(int(i), int(j)) for i, j in below), key=lambda head: float(heads.estimate[head]))
    top = Head(*map(int, np.unravel_index(np.nanargmin(heads.estimate), heads.estimate.shape)))
    strongest = {"head": str(top), "effect": heads.estimate[top], "low": heads.low[top], "high": heads.high[top]}
    return base | {
        "below": [str(head) for head in keys],
        "certain": [str(head) for head in sure.key_heads(s["threshold"], s["alpha"])],
        "strongest": strongest,
    }


def _stability(subject: Subject, sign: str, s: Mapping[str, Any]) -> Results:
    """Halves, templates, and whether there were prompts enough."""
    found = subject.discovery(sign, s["n"], s["seed"])
    judged = judge(found, seed=s["seed"])
    effects = relative_effects(found)
    try:
        across = stats.across_groups(effects, found.pairs.strata["template"]).mean
        near = int(np.nanargmin(np.abs(mean_effects(effects) - s["threshold"])))
        head = Head(*map(int, np.unravel_index(near, effects.shape[:2])))
        advice = stats.prompts_for_threshold(effects[head], found.pairs, threshold=s["threshold"])
    except InputError as error:
        return {"halves": judged.stability, "reason": str(error)}
    asked = {"head": str(head), "enough": advice.enough, "half_width": advice.half_width, "text": advice.text}
    return {"halves": judged.stability, "across_templates": across, "advice": asked}


def _range(record: Results) -> tuple[float, float]:
    shares = [one["families"]["operator"]["share"] for one in record["results"]["operators"].values()]
    return min(shares), max(shares)


def short(record: Results) -> str:
    low, high = _range(record)
    best = min(
        ((one["families"]["operator"]["heads"][0], sign) for sign, one in record["results"]["operators"].items()),
        key=lambda pair: pair[0]["effect"],
    )
    return (
        f"{words.percent(low)} to {words.percent(high)} of the heads below "
        f"{words.signed(record['settings']['threshold'], 0)}; strongest {best[0]['head']} = "
        f"{words.signed(best[0]['effect'])} ({words.sign(best[1])})"
    )


def section(record: Results) -> list[str]:
    operators, s = record["results"]["operators"], record["settings"]
    limit = words.signed(s["threshold"], 0)
    first = [
        [
            words.sign(sign),
            f"{f['prompts']}",
            words.percent(f["accuracy"]),
            words.number(f["strength"], ".3f"),
            words.percent(f["corrupted_still_correct"]),
            f"{f['below']} of {record['model']['layers'] * record['model']['heads']} ({words.percent(f['share'])})",
            f"{f['certain']}",
        ]
        for sign, one in operators.items()
        for f in [one["families"]["operator"]]
    ]
    heads = [
        [
            words.sign(sign),
            h["head"],
            words.signed(h["effect"]),
            words.interval(h["low"], h["high"]),
            words.few(h["p_adjusted"]),
            "yes" if h["certain"] else "no",
        ]
        for sign, one in operators.items()
        for h in one["families"]["operator"]["heads"]
    ]
    styles = [
        [words.sign(sign), *(_style_cell(one["styles"][style]) for style in one["styles"])]
        for sign, one in operators.items()
    ]
    families = [
        [words.sign(sign), *(_family_cell(one["families"][c]) for c in one["families"])]
        for sign, one in operators.items()
    ]
    top = operators["+"]["families"]["operator"]
    return [
        f"The operator is replaced by a null word or symbol. Strength = P(answer, clean) - P(answer, corrupted). "
        f"*Certain*: the whole 95 % interval lies below {limit} and the adjusted p below {s['alpha']}.",
        words.table(
            ["operator", "prompts", "accuracy", "strength", "still right when corrupted", f"below {limit}", "certain"],
            first,
        ),
        "![Effects of all heads](E1.png)",
        f"Heads below {limit} (where there are none, the strongest):",
        words.table(["operator", "head", "effect", "95 % interval", "adjusted p", "certain"], heads),
        f"The same by prompt style: heads below {limit} (certain ones), then the strongest head:",
        words.table(["operator", *STYLES], styles),
        f"By corruption family: heads below {limit}, strength of the corruption:",
        words.table(["operator", *(FAMILY[c] for c in CORRUPTIONS)], families),
        f"Intervals and p-values: {top['method']}.",
        words.bullets(_reading(record)),
    ]


def _style_cell(one: Results) -> str:
    if "reason" in one:
        return f"{one['prompts']} prompts: too few"
    best = one["strongest"]
    names = words.listing(one["below"])
    return f"{names} ({len(one['certain'])}); {best['head']} {words.signed(best['effect'])}"


def _family_cell(one: Results) -> str:
    names = words.listing(h["head"] for h in one["heads"]) if one["below"] else "none"
    return f"{names}; {words.number(one['strength'])}"


def _reading(record: Results) -> list[str]:
    operators, s = record["results"]["operators"], record["settings"]
    low, high = _range(record)
    total = record["model"]["layers"] * record["model"]["heads"]
    fits = "lies below the paper's 5 %" if high < 0.05 else "reaches above the paper's 5 %"
    lines = [
        f"Sparsity: the share of heads {'is' if low == high else 'runs from'} {words.percent(low)}"
        + ("" if low == high else f" to {words.percent(high)}")
        + f" and {fits}; one head of {total} is {words.percent(1 / total, 2)}."
    ]
    layers = sorted({Head.parse(h["head"]).layer for one in operators.values() for h in _below(one, "operator")})
    lines.append(
        f"Place: key heads sit in {_layers(layers)} of {record['model']['layers']} (counted from 0); the paper's in "
        "layers 12-17 of 32."
        if layers
        else "Place: there are no key heads under this corruption."
    )
    hidden = [
        f"{words.sign(sign)} {words.listing(found)}" for sign, one in operators.items() if (found := _hidden(one))
    ]
    if hidden:
        lines.append(
            "Not seen by the paper's corruption, below the threshold only when operands are swapped: "
            f"{'; '.join(hidden)}."
        )
    typed = [
        f"{words.sign(sign)} "
        + words.listing(f"{h} {t['type']}{'' if t['clear'] else ' (open)'}" for h, t in one["types"].items())
        for sign, one in operators.items()
    ]
    lines.append(
        f"Types, by what certainly moves a head (*open*: other families may too; *both*: operator and operands): "
        f"{'; '.join(typed)}."
    )
    for sign, one in operators.items():
        lines.append(_stable(sign, one["stability"], s))
    return lines


def _hidden(one: Results) -> list[str]:
    """Heads below the threshold under swapped operands only."""
    seen = {h["head"] for h in _below(one, "operator")}
    return sorted({h["head"] for c in CORRUPTIONS[1:] for h in _below(one, c)} - seen, key=Head.parse)


def _below(one: Results, corruption: str) -> list[Results]:
    family = one["families"][corruption]
    return list(family["heads"]) if family["below"] else []


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {words.listing(layers)}"


def _stable(sign: str, one: Results, s: Mapping[str, Any]) -> str:
    halves = one["halves"]
    said = "no split halves (too few operand pairs)"
    if halves:
        r = halves["spearman"]
        said = f"halves of the operand pairs rank the heads alike to {words.number(r['median'])} (Spearman)"
    if "reason" in one:
        return f"Stability, {words.sign(sign)}: {said}; no more, for there are too few prompts."
    advice = one["advice"]
    enough = "prompts enough" if advice["enough"] else "more prompts needed"
    return (
        f"Stability, {words.sign(sign)}: {said}, two templates to {words.number(one['across_templates'])} on average; "
        f"{enough} to place {advice['head']}, the head nearest the threshold (+-{words.percent(advice['half_width'])}, "
        f"wanted +-{words.percent(abs(s['threshold']) / 2)})."
    )


def figures(record: Results) -> Mapping[str, Figure]:
    from pyarith.plots import effects_panels

    def array(values: Any) -> np.ndarray:
        return np.array([[np.nan if v is None else v for v in row] for row in values], np.float64)

    panels = {
        f"{NAMES[sign]} {sign}": (array(one["effects"]), None) for sign, one in record["results"]["operators"].items()
    }
    return {"E1.png": effects_panels(panels, threshold=record["settings"]["threshold"])}


EXPERIMENT = Experiment(
    name="E1",
    title="Path patching of all heads",
    question="Which heads lower the answer's logit when they get their output from a prompt without the operation?",
    paper="fewer than 5 % of the heads lie beyond -5 %; they sit in layers 12-17; the strongest, 12.22, has -14 %.",
    settings={"n": 400, "seed": 0, "threshold": -0.05, "alpha": 0.05, "resamples": 10_000},
    quick={"n": 48, "resamples": 200},
    run=run,
    short=short,
    section=section,
    figures=figures,
)
