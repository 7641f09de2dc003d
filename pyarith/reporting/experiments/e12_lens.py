"""E12: the logit lens before and after each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyarith import analysis
from pyarith.errors import AlignmentError
from pyarith.prompts import PromptPairs
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject

STAGES = ("before", "after")
KINDS = ("answer", "operand", "neighbour", "number", "word")
NEAR = 2  # numbers this close to the answer are its neighbours
_EXAMPLE = ("4 + 3 =", "4 < 3 =", "7")


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    return {
        "example": _example(subject, s),
        "operators": {sign: _operator(subject, sign, s) for sign in SIGNS},
    }


def _example(subject: Subject, s: Mapping[str, Any]) -> Results:
    prompt, corrupted, answer = _EXAMPLE
    try:
        pairs = PromptPairs.from_text([prompt], [corrupted], [answer], subject.tokenizer)
    except AlignmentError as error:
        return {"prompt": prompt, "answer": answer, "reason": str(error)}
    found = analysis.logit_lens(subject.model, pairs, k=s["k"])

    def texts(ids: np.ndarray, values: np.ndarray) -> list[list[Any]]:
        return [[subject.tokenizer.decode([int(i)]).strip(), float(v)] for i, v in zip(ids, values, strict=True)]

    layers = [
        {
            **{
                stage: texts(found.tokens[layer, i, 0], found.probabilities[layer, i, 0])
                for i, stage in enumerate(STAGES)
            },
            "promoted": texts(found.promoted[layer, 0], found.promoted_by[layer, 0]),
        }
        for layer in range(len(found.tokens))
    ]
    return {"prompt": pairs.prompts[0], "answer": answer, "layers": layers}


def _operator(subject: Subject, sign: str, s: Mapping[str, Any]) -> Results:
    """What the most probable token is, over prompts, by layer and stage."""
    pairs = subject.pairs(sign, s["n"], s["seed"])
    found = analysis.logit_lens(subject.model, pairs, k=1)
    assert found.answer_ranks is not None and found.answer_probabilities is not None
    values = np.array([int(text) for text in pairs.answer_texts])
    operands = np.stack([pairs.strata[name].astype(int) for name in ("operand_a", "operand_b")], 1)
    text = {int(i): subject.tokenizer.decode([int(i)]).strip() for i in np.unique(found.tokens)}
    numbers = {i: int(t) if t.isascii() and t.isdigit() else None for i, t in text.items()}
    others = values[np.random.default_rng(s["seed"]).permutation(len(values))]
    layers = []
    for layer in range(len(found.tokens)):
        stages = {}
        for i, stage in enumerate(STAGES):
            top = [numbers[int(token)] for token in found.tokens[layer, i, :, 0]]
            kinds = [kind(*row) for row in zip(top, values, operands, strict=True)]
            wrong = [i for i, one in enumerate(kinds) if one in ("neighbour", "number")]
            stages[stage] = {
                **{name: kinds.count(name) / len(kinds) for name in KINDS},
                "wrong": len(wrong),
                "wrong_near": sum(_near(top[i], values[i]) for i in wrong),
                "wrong_near_other": sum(_near(top[i], others[i]) for i in wrong),
                "p_answer": float(found.answer_probabilities[layer, i].mean()),
                "median_rank": float(np.median(found.answer_ranks[layer, i])),
            }
        layers.append(stages)
    return {"prompts": len(pairs), "layers": layers}


def _near(top: int | None, answer: int) -> bool:
    return top is not None and 0 < abs(top - answer) <= NEAR


def kind(top: int | None, answer: int, operands: Any) -> str:
    """What a most probable token is; the first that holds of answer, operand, neighbour, number, word."""
    if top is None:
        return "word"
    if top == answer:
        return "answer"
    if top in operands:
        return "operand"
    return "neighbour" if _near(top, answer) else "number"


def _first(one: Results) -> str:
    """The first layer and stage whose lens has the answer first in more than half of the prompts."""
    for layer, stages in enumerate(one["layers"]):
        for stage in STAGES:
            if stages[stage]["answer"] > 0.5:
                return f"{stage} MLP {layer}"
    return "never"


def short(record: Results) -> str:
    cells = (f"{words.sign(sign)} {_first(one)}" for sign, one in record["results"]["operators"].items())
    return f"the answer leads the lens in most prompts from: {', '.join(cells)}"


def section(record: Results) -> list[str]:
    example = record["results"]["example"]
    parts = []
    if "reason" in example:
        parts.append(f"`{example['prompt']}`: not done: {example['reason']}")
    else:
        rows = [
            [str(i), *(_tokens(one[name]) for name in (*STAGES, "promoted"))] for i, one in enumerate(example["layers"])
        ]
        parts += [
            f"`{example['prompt']}` (answer {example['answer']}): most probable tokens of the residual stream, and "
            "the tokens whose logits the MLP raises most:",
            words.table(["layer", "before the MLP", "after it", "raised by the MLP (logits)"], rows),
        ]
    parts.append(
        f"Over all prompts, percent of prompts whose most probable token after the MLP is the answer / an operand / a "
        f"neighbour of the answer (at most {NEAR} away) / another number / no number; in brackets the mean P(answer):"
    )
    operators = record["results"]["operators"]
    rows = [
        [str(layer), *(_kinds(one["layers"][layer]["after"]) for one in operators.values())]
        for layer in range(record["model"]["layers"])
    ]
    parts.append(words.table(["layer", *map(words.sign, operators)], rows))
    return [*parts, words.bullets(_reading(record))]


def _tokens(top: list[list[Any]], most: int = 4) -> str:
    return ", ".join(f"`{text}` {value:.2f}" for text, value in top[:most])


def _kinds(one: Results) -> str:
    shares = " / ".join(f"{100 * one[name]:.0f}" for name in KINDS)
    return f"{shares} ({words.number(one['p_answer'])})"


def _reading(record: Results) -> list[str]:
    lines = []
    for sign, one in record["results"]["operators"].items():
        after = [stages["after"] for stages in one["layers"]]
        operand = int(np.argmax([stage["operand"] for stage in after]))
        near = int(np.argmax([stage["neighbour"] for stage in after]))
        at = after[near]
        lines.append(
            f"{words.sign(sign)}: operands lead most often after MLP {operand} "
            f"({words.percent(after[operand]['operand'], 0)} of the prompts), neighbours of the answer after MLP "
            f"{near} ({words.percent(at['neighbour'], 0)}: of {words.count(at['wrong'], 'wrong number')} there "
            f"{at['wrong_near']} are near the prompt's own answer, {at['wrong_near_other']} near another prompt's), "
            f"the answer in most prompts {_from(one)}."
        )
    return lines


def _from(one: Results) -> str:
    first = _first(one)
    return first if first == "never" else f"from {first} on"


EXPERIMENT = Experiment(
    name="E12",
    title="Logit lens",
    question="What would the model say after each layer of `4 + 3 =`?",
    paper="coarse to fine: first the operands, then numbers near the answer, then the answer.",
    settings={"n": 400, "seed": 0, "k": 5},
    quick={"n": 24},
    run=run,
    short=short,
    section=section,
)
