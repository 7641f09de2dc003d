"""E3: do the operators share their heads?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarith import analysis
from pyarith.reporting.experiments import words
from pyarith.reporting.experiments.registry import Experiment, Results
from pyarith.reporting.experiments.subject import SIGNS, Subject

FAMILIES = {"operator": "operator replaced", "operands": "both operands swapped"}


def run(subject: Subject, s: Mapping[str, Any]) -> Results:
    found = {}
    for corruption in FAMILIES:
        results = {sign: subject.discovery(sign, s["n"], s["seed"], corruption).result for sign in SIGNS}
        pairs = {sign: subject.pairs(sign, s["n"], s["seed"], corruption) for sign in SIGNS}
        by_limit = analysis.overlap(
            results, threshold=s["threshold"], pairs=pairs, resamples=s["resamples"], seed=s["seed"]
        )
        top = analysis.overlap(results, k=min(s["k"], subject.n_heads))
        found[corruption] = {
            "key_heads": {sign: [str(head) for head in heads] for sign, heads in by_limit.key_heads.items()},
            "shared_by_all": [str(head) for head in by_limit.shared()],
            "pairs": list(by_limit.rows()),
            "top": list(top.rows()),
        }
    return {"families": found}


def short(record: Results) -> str:
    pairs = record["results"]["families"]["operator"]["pairs"]
    low, high = (min(pairs, key=_rank), max(pairs, key=_rank))
    return (
        f"rank correlation of the heads' effects {words.number(_rank(low))} ({_pair(low)}) to "
        f"{words.number(_rank(high))} ({_pair(high)})"
    )


def _rank(row: Results) -> float:
    return float("-inf") if row["spearman"] is None else float(row["spearman"])


def _pair(row: Results) -> str:
    return f"{words.sign(row['a'])} and {words.sign(row['b'])}"


def section(record: Results) -> list[str]:
    k = record["settings"]["k"]
    parts = []
    for corruption, one in record["results"]["families"].items():
        keys = ", ".join(f"{words.sign(sign)} {words.listing(heads)}" for sign, heads in one["key_heads"].items())
        parts.append(
            f"**{FAMILIES[corruption].capitalize()}.** Key heads: {keys}. Shared by all: "
            f"{words.listing(one['shared_by_all'])}."
        )
        rows = [
            [
                _pair(row),
                f"{int(row['common'])}",
                words.number(row["jaccard"]),
                f"{int(top['common'])} ({words.number(top['jaccard'])}; chance "
                f"{words.number(top['expected_jaccard'])})",
                words.few(top["p"]),
                words.number(row["spearman"]),
                f"{words.number(row['spearman_low'])} .. {words.number(row['spearman_high'])}",
            ]
            for row, top in zip(one["pairs"], one["top"], strict=True)
        ]
        columns = ["operators", "key heads shared", "Jaccard", f"top {k} shared (Jaccard)", "p", "Spearman", "95 %"]
        parts.append(words.table(columns, rows))
    return [*parts, words.bullets(_reading(record))]


def _reading(record: Results) -> list[str]:
    lines = []
    for corruption, one in record["results"]["families"].items():
        near = next(row for row in one["pairs"] if {row["a"], row["b"]} == {"+", "-"})
        others = [row for row in one["pairs"] if row is not near]
        above = sum(_rank(near) > _rank(row) for row in others)
        said = {len(others): "the most alike of all pairs", 0: "the least alike of all pairs"}.get(
            above, f"more alike than {above} of the {len(others)} other pairs"
        )
        counts = {sign: len(heads) for sign, heads in one["key_heads"].items()}
        more = min(counts["*"], counts["/"]) > max(counts["+"], counts["-"])
        lines.append(
            f"{FAMILIES[corruption].capitalize()}: `+` and `-` are {said} (Spearman {words.number(near['spearman'])}). "
            f"Numbers of key heads: {words.listing(f'{words.sign(sign)} {n}' for sign, n in counts.items())}; that "
            f"`*` and `/` use more than `+` and `-` {'holds' if more else 'does not hold'} here."
        )
    lines.append(
        "With few key heads Jaccard takes few values and one head changes it much; the rank correlation uses all "
        "heads. Noise in effects near 0 lowers it: compare with the stability of one operator's ranking (E1)."
    )
    return lines


EXPERIMENT = Experiment(
    name="E3",
    title="Overlap across operators",
    question="Do addition, subtraction, multiplication and division use the same heads?",
    paper="addition and subtraction share almost all their key heads, multiplication and division use more.",
    settings={"n": 400, "seed": 0, "threshold": -0.05, "k": 10, "resamples": 2_000},
    quick={"n": 48, "resamples": 100},
    run=run,
    short=short,
    section=section,
)
