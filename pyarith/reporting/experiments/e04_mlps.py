"""E4: path patching of all MLPs, effects with their sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject
from pyarith.types import Head

FAMILIES = ("operator", "operands")


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    operators = {}
    for sign in SIGNS:
        found = {}
        for corruption in FAMILIES:
            mlps = subject.confidence(sign, s["n"], s["seed"], corruption, s["resamples"]).mlps
            assert mlps is not None
            keys = subject.discovery(sign, s["n"], s["seed"], corruption).result.key_heads(s["threshold"])
            columns = {name: getattr(mlps, name) for name in ("estimate", "low", "high", "p_adjusted")}
            found[corruption] = {**columns, "key_heads": [str(head) for head in keys]}
        operators[sign] = found
    return {"operators": operators}


def _certain(one: Results, layer: int, s: Mapping[str, Any]) -> bool:
    low, high, p = (one[name][layer] for name in ("low", "high", "p_adjusted"))
    return None not in (low, high, p) and (low > 0 or high < 0) and p < s["alpha"]


def _large(one: Results, s: Mapping[str, Any]) -> list[int]:
    """Layers that move the logit by more than the threshold, either way."""
    return [i for i, value in enumerate(one["estimate"]) if value is not None and abs(value) > abs(s["threshold"])]


def short(record: Results) -> str:
    operators, s = record["results"]["operators"], record["settings"]
    layers = sorted({layer for one in operators.values() for layer in _large(one["operator"], s)})
    limit = words.percent(abs(s["threshold"]), 0)
    if not layers:
        return f"no MLP moves the logit by more than {limit}"
    values = [one["operator"]["estimate"][layer] for one in operators.values() for layer in _large(one["operator"], s)]
    return (
        f"MLPs {words.listing(layers)} move the logit by more than {limit} in some operator; "
        f"{words.signed(min(values))} to {words.signed(max(values))}"
    )


def section(record: Results) -> list[str]:
    operators, s = record["results"]["operators"], record["settings"]
    parts = [
        f"Mean relative effect with its 95 % interval; bold: the interval leaves out 0 and the adjusted p is below "
        f"{s['alpha']}."
    ]
    for corruption, title in zip(FAMILIES, ("operator replaced", "both operands swapped"), strict=True):
        rows = [
            [str(layer), *(_cell(one[corruption], layer, s) for one in operators.values())]
            for layer in range(record["model"]["layers"])
        ]
        parts += [f"{title.capitalize()}:", words.table(["MLP", *map(words.sign, operators)], rows)]
    return [*parts, words.bullets(_reading(record))]


def _cell(one: Results, layer: int, s: Mapping[str, Any]) -> str:
    value = words.signed(one["estimate"][layer])
    value = f"**{value}**" if _certain(one, layer, s) else value
    return f"{value} ({words.interval(one['low'][layer], one['high'][layer])})"


def _reading(record: Results) -> list[str]:
    operators, s = record["results"]["operators"], record["settings"]
    limit, lines = words.percent(abs(s["threshold"]), 0), []
    for sign, one in operators.items():
        layers = _large(one["operator"], s)
        raising = [layer for layer in layers if one["operator"]["estimate"][layer] > 0]
        heads = [Head.parse(head).layer for head in one["operator"]["key_heads"]]
        behind = [layer for layer in layers if heads and layer >= min(heads)]
        place = f"{len(behind)} of them in or behind the first layer with a key head ({min(heads)})" if heads else ""
        signs = (
            f"{words.listing(raising)} raise{'s' if len(raising) == 1 else ''} the logit" if raising else "all lower it"
        )
        said = [signs, place] if layers else []
        shown = f"MLP{'s' * (len(layers) > 1)} {words.listing(layers)}" if layers else "no MLP"
        lines.append(
            f"{words.sign(sign)}: beyond {limit} {'are' if len(layers) > 1 else 'is'} {shown}"
            f"{''.join(f'; {part}' for part in said if part)}."
        )
    early = [
        layer
        for layer in range(record["model"]["layers"])
        if all(layer not in _large(one["operator"], s) for one in operators.values())
    ]
    lines.append(f"Near 0 in every operator (within {limit}): MLPs {words.listing(early)}.")
    return lines


EXPERIMENT = Experiment(
    name="E4",
    title="Path patching of all MLPs",
    question="Which MLPs move the answer's logit, and which way?",
    paper="MLPs of layers 0-16 have effects near 0; from layer 17 on about +-10 %.",
    settings={"n": 400, "seed": 0, "threshold": -0.05, "alpha": 0.05, "resamples": 10_000},
    quick={"n": 48, "resamples": 200},
    run=run,
    short=short,
    section=section,
)
