"""Races for the top k heads of the demo model against the full run: rows of the replay spent, and wall time.

    python bench/bench_adaptive.py [--quick] [--rounds N] [--out FILE]

Per operator and k, on the same prompts: ``discover(top_k=k, tolerance=0.1)`` beside ``discover(senders=("heads",))``
on all of them. A row is a row of the residual stream that passes one MLP, identity rows included; their number depends
on nothing but model, prompts and seed. Checked first: by how many logits the worst head of the race's top k lies above
the k-th of the full run's, in the mean over operand pairs; allowed is the tolerance. With ``--rounds 0`` nothing is
timed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, Check, Record, Row, Timing, time_rounds

TOLERANCE = 0.1
KS = (2, 4, 8)
OPTIONS = {"progress": False, "verify": 0}


def cluster_means(discovery: Any) -> np.ndarray:
    """[layer, head] mean change of the answer's logit over operand pairs, of their means over prompts."""
    pairs = discovery.pairs.strata["pair"]
    changes = discovery.result.head_changes.astype(np.float64)
    return np.mean([changes[..., pairs == pair].mean(-1) for pair in np.unique(pairs)], 0)


def run_case(model: Any, pairs: Any, operator: str, k: int, rounds: int, record: Record) -> None:
    """One row of a record for the full run, one for the race."""
    import pyarith as pa

    calls = {
        "full": lambda: pa.discover(model, pairs, senders=("heads",), **OPTIONS),
        "race": lambda: pa.discover(model, pairs, top_k=k, tolerance=TOLERANCE, **OPTIONS),
    }
    full, race = calls["full"](), calls["race"]()
    means, top = cluster_means(full), race.top
    best = np.sort(means, axis=None)[:k]
    worst = max(means[head] for head in top.heads)
    check = Check("full run", max(0.0, float(worst - best[-1])), TOLERANCE).require(f"{operator}, k = {k}")
    if top.rows_full != full.result.settings["rows"]:
        raise ValueError(f"rows: a full run has {full.result.settings['rows']}, the race says {top.rows_full}")
    samples = time_rounds(calls, rounds) if rounds else {}
    timings = {name: Timing.of(one) for name, one in samples.items()}
    for name in calls:
        spent = {"rows": full.result.settings["rows"], "prompts": len(pairs)}
        if name == "race":
            spent = {
                "rows": top.rows,
                "prompts": top.n_used,
                "share_of_rows": top.rows / top.rows_full,
                "undecided": len(top.undecided),
                "ties": int(top.tied.sum()),
                "same_as_full": len({tuple(head) for head in top.heads} & _first(means, k)),
            }
            if timings:
                spent["share_of_time"] = timings["race"].median / timings["full"].median
        row = Row(
            name="adaptive",
            provider=name,
            shape={"operator": operator, "k": k, "head": means.size, "prompt": len(pairs), "tolerance": TOLERANCE},
            dtype="float32",
            check=check,
            seconds=timings.get(name),
            extra=spent,
        )
        record.write(row)


def _first(means: np.ndarray, k: int) -> set[tuple[int, int]]:
    """The k heads with the most negative means."""
    places = np.argsort(means, axis=None)[:k]
    return {(int(i), int(j)) for i, j in zip(*np.unravel_index(places, means.shape), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one operator and few prompts, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that are timed; 0 = none")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    import pyarith as pa

    quick = arguments.quick
    rounds = min(arguments.rounds, 1) if quick else arguments.rounds
    model, tokenizer = pa.load_demo()
    record = Record(arguments.out or RESULTS / ("quick.jsonl" if quick else "adaptive.jsonl"), quick)
    for operator in "+" if quick else "+-*/":
        pairs = pa.tasks.arithmetic(tokenizer, operator, "operator", n=100 if quick else 1000, seed=0)
        for k in KS[:1] if quick else KS:
            run_case(model, pairs, operator, k, rounds, record)


if __name__ == "__main__":
    main()
