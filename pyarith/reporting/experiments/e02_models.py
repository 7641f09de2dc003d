"""E2: the same path patching on other models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject
from pyarith.types import Head


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    return {"models": [_model(one, s) for one in (subject, *subject.also)]}


def _model(subject: Subject, s: Mapping[str, Any]) -> Results:
    operators = {}
    for sign in SIGNS:
        found = subject.discovery(sign, s["n"], s["seed"])
        summary = found.summary(s["threshold"])
        sure = subject.confidence(sign, s["n"], s["seed"], "operator", s["resamples"])
        best = found.result.top(1)[0]
        assert sure.heads is not None
        operators[sign] = {
            **{name: summary[name] for name in ("accuracy", "strength")},
            "heads": summary["key_heads"],
            "certain": [str(head) for head in sure.key_heads(s["threshold"], s["alpha"])],
            "strongest": {
                "head": str(best.head),
                "effect": best.effect,
                "low": sure.heads.low[best.head],
                "high": sure.heads.high[best.head],
            },
        }
    return {**subject.identity, "operators": operators}


def kind(model: Results) -> str:
    """How keys and values are shared."""
    if model["kv_heads"] == model["heads"]:
        return "MHA"
    shared = "MQA" if model["kv_heads"] == 1 else "GQA"
    return f"{shared}, {model['kv_heads']} key-value heads"


def short(record: Results) -> str:
    return "; ".join(f"`{m['name']}` ({kind(m)}): {_shares(m)}" for m in record["results"]["models"])


def _shares(model: Results) -> str:
    shares = [len(one["heads"]) / (model["layers"] * model["heads"]) for one in model["operators"].values()]
    return f"{words.percent(min(shares))} to {words.percent(max(shares))} of the heads"


def section(record: Results) -> list[str]:
    limit = words.signed(record["settings"]["threshold"], 0)
    rows = [
        [
            f"`{model['name']}`",
            f"{model['family']}, {model['layers']} x {model['heads']}, {kind(model)}",
            words.sign(sign),
            words.percent(one["accuracy"]),
            words.number(one["strength"]),
            f"{words.listing(one['heads'])} ({len(one['certain'])} certain)",
            f"{one['strongest']['head']} {words.signed(one['strongest']['effect'])} "
            f"({words.interval(one['strongest']['low'], one['strongest']['high'])})",
        ]
        for model in record["results"]["models"]
        for sign, one in model["operators"].items()
    ]
    columns = [
        "model",
        "family, layers x heads",
        "operator",
        "accuracy",
        "strength",
        f"below {limit}",
        "strongest head",
    ]
    made = [
        f"`{model['name']}` was made by `{model['origin']}`."
        for model in record["results"]["models"]
        if model["origin"]
    ]
    return [*made, words.table(columns, rows), words.bullets(_reading(record))]


def _reading(record: Results) -> list[str]:
    lines = []
    for model in record["results"]["models"]:
        layers = sorted({Head.parse(h).layer for one in model["operators"].values() for h in one["heads"]})
        most = max(len(one["heads"]) for one in model["operators"].values()) / (model["layers"] * model["heads"])
        claim = "below" if most < 0.05 else "not below"
        lines.append(
            f"`{model['name']}`: at most {words.percent(most)} of the heads per operator, {claim} the paper's 5 %; "
            f"layers {words.listing(layers)} of {model['layers']}."
        )
    lines.append(
        "Head numbers of different models have no common meaning: what can agree is how few heads there are and how "
        "deep they lie."
    )
    return lines


EXPERIMENT = Experiment(
    name="E2",
    title="Other models",
    question="Do other models, with other ways to share keys and values, show the same pattern?",
    paper="LLaMA2-13B and Mistral-7B (grouped-query attention) alike.",
    settings={"n": 400, "seed": 0, "threshold": -0.05, "alpha": 0.05, "resamples": 10_000},
    quick={"n": 48, "resamples": 200},
    run=run,
    short=short,
    section=section,
    needs_also=True,
)
