"""E11: what MLPs read and write: cosines with operands and answer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith import analysis
from pyarith.prompts import PromptPairs
from pyarith.reporting.analyses import single_operands
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import NAMES, SIGNS, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VISIBLE = 0.05  # how far a cosine must exceed that of other prompts' numbers to be spoken of
_FEW = 16  # layers: with fewer, three points of a curve are next to each other
CURVES = ("operand_a", "operand_b", "answer")


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    operators: dict[str, Results] = {}
    for sign in SIGNS:
        pairs = subject.pairs(sign, s["n"], s["seed"])
        single = single_operands(pairs)
        if not single.any():
            operators[sign] = {"reason": "no prompt has both operands as one token each"}
            continue
        used = pairs.subset(single)
        found = analysis.mlp_cosines(subject.model, used)
        other = _with_other_prompts(subject, used, s["seed"])
        points = {name: analysis.three_points(curve) for name, curve in found.mean.items()}
        operators[sign] = {
            "prompts": int(single.sum()),
            "left_out": int((~single).sum()),
            "mean": found.mean,
            "spread": found.spread,
            "other_prompts": other.mean,
            "points": {name: None if at is None else list(at) for name, at in points.items()},
        }
    return {"operators": operators}


def _with_other_prompts(subject: Subject, pairs: PromptPairs, seed: int) -> analysis.MlpCosines:
    """The same prompts' states with the operands and answers of other prompts: what any such number would show."""
    assert pairs.roles is not None
    rows = np.arange(len(pairs))
    ids = [pairs.clean[rows, (pairs.roles == pairs.role_names.index(name)).argmax(1)] for name in CURVES[:2]]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return analysis.mlp_cosines(
        subject.model,
        pairs.clean,
        attention_mask=pairs.attention_mask,
        answers=pairs.answers[order],
        operands=np.stack(ids, 1)[order],
    )


def _done(record: Results) -> dict[str, Results]:
    return {sign: one for sign, one in record["results"]["operators"].items() if "reason" not in one}


def _points(at: list[int] | None) -> str:
    return "flat" if at is None else "-".join(map(str, at))


def _peak(values: list[float]) -> int:
    return int(np.argmax(values))


def short(record: Results) -> str:
    cells = (f"{words.sign(sign)} {_points(one['points']['answer'])}" for sign, one in _done(record).items())
    return f"the answer's start-inflection-end, of {record['model']['layers']} layers: {', '.join(cells) or 'none'}"


def section(record: Results) -> list[str]:
    found = _done(record)
    missing = [
        f"{words.sign(sign)}: not done: {one['reason']}"
        for sign, one in record["results"]["operators"].items()
        if "reason" in one
    ]
    rows = [
        [
            words.sign(sign),
            str(one["prompts"]),
            *(_largest(one, name) for name in CURVES),
            _points(one["points"]["answer"]),
        ]
        for sign, one in found.items()
    ]
    columns = [
        *("operator", "prompts", "cos(MLP_in, A), largest", "cos(MLP_in, B), largest"),
        *("cos(MLP_out - MLP_in, C), largest", "start-inflection-end"),
    ]
    return [
        "Cosines at the last token with rows of the unembedding matrix, mean over prompts. Start and end: where the "
        "answer's curve has risen by 10 and by 90 % of its range; inflection: its steepest step. In brackets the "
        "layer, and the mean there with the operands or answers of other prompts: what any number of that kind would "
        "show.",
        *(["![Cosines of MLP input and output](E11.png)", words.table(columns, rows)] if found else []),
        *missing,
        words.bullets(_reading(record)),
    ]


def _largest(one: Results, name: str) -> str:
    layer = _peak(one["mean"][name])
    return f"{one['mean'][name][layer]:+.2f} (layer {layer}; others {one['other_prompts'][name][layer]:+.2f})"


def _reading(record: Results) -> list[str]:
    lines = []
    for sign, one in _done(record).items():
        answer = one["points"]["answer"]
        if answer is None:
            lines.append(f"{words.sign(sign)}: the answer's curve is flat.")
            continue
        peaks = {name: _peak(one["mean"][name]) for name in CURVES[:2]}
        before = all(peak < answer[2] for peak in peaks.values())
        own = {
            name: max(a - b for a, b in zip(one["mean"][name], one["other_prompts"][name], strict=True))
            for name in CURVES
        }
        weak = max(own["operand_a"], own["operand_b"]) < _VISIBLE
        lines.append(
            f"{words.sign(sign)}: operands are largest at layers {peaks['operand_a']} (A) and "
            f"{peaks['operand_b']} (B), the answer has risen at {answer[2]}: the paper's order, operands first, "
            f"{'holds' if before else 'does not hold'}. Above other prompts' numbers: A at most "
            f"{own['operand_a']:+.2f}, B {own['operand_b']:+.2f}, the answer {own['answer']:+.2f}"
            f"{', so that the operands can hardly be seen and their layers mean little' if weak else ''}."
        )
    layers = record["model"]["layers"]
    if layers < _FEW:
        lines.append(f"With {layers} layers three points are coarse, beside the paper's 32.")
    return lines


def figures(record: Results) -> Mapping[str, Figure]:
    from pyarith.plots import cosines_figure

    found = {
        f"{NAMES[sign]} {sign}": SimpleNamespace(
            mean={name: np.array(values) for name, values in one["mean"].items()},
            spread={name: np.array(values) for name, values in one["spread"].items()},
            points=one["points"]["answer"],
        )
        for sign, one in _done(record).items()
    }
    return {"E11.png": cosines_figure(found)} if found else {}


EXPERIMENT = Experiment(
    name="E11",
    title="MLPs: from operands to the answer",
    question="In which layers do MLPs read the operands, and in which do they write the answer?",
    paper=(
        "cosines of the input with the operands rise in layers 12-17, of the write with the answer from 17 on; start, "
        "inflection and end at 13, 18 and 28 of 32."
    ),
    settings={"n": 400, "seed": 0},
    quick={"n": 24},
    run=run,
    short=short,
    section=section,
    figures=figures,
)
