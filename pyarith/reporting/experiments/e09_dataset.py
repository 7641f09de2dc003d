"""E9: heads found on a file of questions, beside those of the operators."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyarith import evaluation, stats, tasks
from pyarith.discovery.discover import discover
from pyarith.errors import check
from pyarith.evaluation import Items
from pyarith.prompts import Aligner, PromptPairs
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject, mean_effects, relative_effects

FILE = "E9.jsonl"
FAMILIES = {"operator": "operator replaced", "operands": "both operands swapped"}


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    path = Path(s["data"]) if s["data"] else _write(subject, s)
    items = evaluation.load_items(path, on_bad="drop")
    pairs = pairs_of(items, subject.tokenizer, s["seed"])
    found = discover(subject.model, pairs, progress=False)
    summary, k = found.summary(s["threshold"]), min(s["k"], subject.n_heads)
    top, effects = found.result.top(k), mean_effects(relative_effects(found))
    shared: dict[str, dict[str, Results]] = {}
    for corruption in FAMILIES:
        shared[corruption] = {}
        for sign in SIGNS:
            other = subject.discovery(sign, s["n"], s["seed"], corruption)
            both = stats.overlap([row.head for row in top], [r.head for r in other.result.top(k)], subject.n_heads)
            shared[corruption][sign] = {
                **{"common": both.common, "expected": both.expected_common, "p": both.p},
                "spearman": stats.spearman(effects, mean_effects(relative_effects(other))),
            }
    names = ("prompts", "accuracy", "strength", "key_heads", "misaligned_left_out")
    return {
        "file": path.name,
        "first": {"prompt": items.prompts[0], "answer": items.answers[0]},
        "rows": items.settings["rows"],
        **{name: summary[name] for name in names},
        "top": [{"head": str(row.head), "effect": row.effect} for row in top],
        "shared": shared,
    }


def _write(subject: Subject, s: Mapping[str, Any]) -> Path:
    """A file of one-step stories beside the record."""
    check(subject.folder is not None, "folder: expected one to write the questions to, got None")
    assert subject.folder is not None
    subject.folder.mkdir(parents=True, exist_ok=True)
    path = subject.folder / FILE
    problems = tasks.draw_problems("word_problem", s["items"], s["seed"])
    rows = [json.dumps({"prompt": one.prompt, "answer": one.answer}) for one in problems]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def pairs_of(items: Items, tokenizer: Any, seed: int) -> PromptPairs:
    """Each question with another one of the file as its corrupted prompt: as many tokens, another answer.

    Raises:
        InputError: no question has another one like that.
        AlignmentError: no answer is one token.
    """
    lengths = [len(ids) for ids in Aligner(tokenizer).encode(items.prompts)]
    alike: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        alike[length].append(row)
    rng = np.random.default_rng(seed)
    chosen: list[tuple[int, int]] = []
    for row, length in enumerate(lengths):
        others = [other for other in alike[length] if items.answers[other] != items.answers[row]]
        if others:
            chosen.append((row, others[rng.integers(len(others))]))
    check(bool(chosen), "data: expected questions of equal length in tokens with different answers, got none")
    return PromptPairs.from_text(
        [items.prompts[row] for row, _ in chosen],
        [items.prompts[other] for _, other in chosen],
        [items.answers[row] for row, _ in chosen],
        tokenizer,
        on_misaligned="drop",
        replaced=[((0, len(items.prompts[row])),) for row, _ in chosen],
        strata={"item": [row for row, _ in chosen]},
    )


def short(record: Results) -> str:
    found = record["results"]["shared"]["operands"]
    k = record["settings"]["k"]
    cells = (f"{one['common']} with {words.sign(sign)}" for sign, one in found.items())
    return f"of the top {k}, shared (operands swapped): {words.listing(cells)}"


def section(record: Results) -> list[str]:
    results, k = record["results"], record["settings"]["k"]
    left = results["rows"] - results["prompts"]
    top = ", ".join(f"{row['head']} {words.signed(row['effect'])}" for row in results["top"])
    rows = [
        [
            words.sign(sign),
            *(
                cell
                for one in (results["shared"][c][sign] for c in FAMILIES)
                for cell in (f"{one['common']} (p {words.few(one['p'])})", words.number(one["spearman"]))
            ),
        ]
        for sign in SIGNS
    ]
    expected = results["shared"]["operator"]["+"]["expected"]
    columns = ["operator"]
    for title in FAMILIES.values():
        columns += [f"top {k} shared, {title}", "Spearman, all heads"]
    return [
        f"`{results['file']}`, {results['rows']} rows such as `{results['first']['prompt']}` -> "
        f"`{results['first']['answer']}`; corrupted by another question of as many tokens with another answer ({left} "
        "rows without one, or with an answer of several tokens, left out); accuracy "
        f"{words.percent(results['accuracy'])}, strength {words.number(results['strength'])}. Own file: `pyarith "
        "reproduce E9 --data FILE` (JSON lines or CSV).",
        f"Its top {k}: {top}.",
        words.table(columns, rows),
        f"Two unrelated sets of {k} heads of this model share {words.number(expected, '.1f')} on average.",
        words.bullets(_reading(record)),
    ]


def _reading(record: Results) -> list[str]:
    found, lines = record["results"]["shared"], []
    for corruption, title in FAMILIES.items():
        sure = [words.sign(sign) for sign, one in found[corruption].items() if one["p"] < 0.05]
        lines.append(f"{title.capitalize()}: more shared than by chance (p < 0.05) with {words.listing(sure)}.")
    means = {c: float(np.mean([one["common"] for one in found[c].values()])) for c in FAMILIES}
    nearer = max(means, key=lambda c: means[c])
    lines.append(
        f"On average {means['operator']:.1f} heads are shared with the operators' tops when the operator is replaced, "
        f"{means['operands']:.1f} when operands are swapped: the file's corruption, another question, is "
        + (
            "nearer to the latter."
            if nearer == "operands" and means["operands"] > means["operator"]
            else "not nearer to the latter."
        )
    )
    return lines


EXPERIMENT = Experiment(
    name="E9",
    title="Heads of a data set",
    question="Do questions from a file rank the same heads as the operators do?",
    paper="GSM8K shares 6 of its top 10 heads.",
    settings={"n": 400, "seed": 0, "k": 10, "items": 200, "threshold": -0.05, "data": ""},
    quick={"n": 48, "items": 40},
    run=run,
    short=short,
    section=section,
)
