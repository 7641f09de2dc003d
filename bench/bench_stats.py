"""Statistics of effects: 10,000 bootstrap resamples and the sign flips of 1,024 heads on 1,000 crossed prompts.

One thread of numpy: run with OMP_NUM_THREADS=1. Checked first: means against weights that repeat every prompt
literally, p-values against sums flipped one pattern at a time.
"""

import argparse
from pathlib import Path

import numpy as np
from harness import RESULTS, Check, Record, Row, Timing, time_rounds


def workload(heads: int, prompts: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Effects [head, prompt] and factors: prompts drawn from 81 operand pairs x 36 templates."""
    rng = np.random.default_rng(0)
    cells = rng.permutation(81 * 36)[:prompts]
    return rng.normal(size=(heads, prompts)), {"pair": cells // 36, "template": cells % 36}


def bootstrap_error(effects: np.ndarray, factors: dict[str, np.ndarray]) -> float:
    """Largest difference of 20 resampled means from those of prompts written out as often as they were drawn."""
    from pyarith.stats.bootstrap import resampled_means, weight_blocks
    from pyarith.stats.clusters import Clusters

    clusters = Clusters.of(factors)
    means = resampled_means(effects[:8], clusters, 20, seed=0)
    weights = np.concatenate(list(weight_blocks(clusters, 20, seed=0))).astype(int)
    literal = [effects[:8, np.repeat(np.arange(len(row)), row)].mean(1) for row in weights]
    return float(np.abs(means - np.stack(literal, 1)).max())


def flip_error(effects: np.ndarray, factors: dict[str, np.ndarray]) -> float:
    """Largest difference of exact p-values of 10 pairs from patterns gone through one by one."""
    from pyarith.stats import sign_flip

    chosen = factors["pair"] < 10
    part, pairs = effects[:8, chosen], factors["pair"][chosen]
    names = np.unique(pairs)
    bits = (np.arange(2 ** len(names))[:, None] >> np.arange(len(names))) & 1
    sums = np.stack([(part * (1 - 2 * row)[np.searchsorted(names, pairs)]).sum(1) for row in bits], 1)
    literal = (np.abs(sums) >= np.abs(sums[:, :1]) - 1e-9).mean(1)
    return float(np.abs(sign_flip(part, {"pair": pairs}).p - literal).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    from pyarith.stats import bootstrap_mean, confidence, sign_flip

    heads, prompts, resamples = (16, 100, 200) if arguments.quick else (1024, 1000, 10_000)
    effects, factors = workload(heads, prompts)
    flips = max(resamples, 40 * heads)
    checks = {
        "bootstrap": Check("prompts repeated literally", bootstrap_error(effects, factors), 1e-12),
        "flips": Check("patterns one by one", flip_error(effects, factors), 1e-12),
    }
    checks = {name: check.require(name) for name, check in checks.items()}
    calls = {
        "percentile": lambda: bootstrap_mean(effects, factors, resamples=resamples),
        "bca": lambda: bootstrap_mean(effects, factors, resamples=resamples, interval="bca"),
        "sign flips": lambda: sign_flip(effects, factors, flips=flips),
        "confidence": lambda: confidence(effects.reshape(-1, 16, prompts), None, factors, resamples=resamples),
    }
    record = Record(arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "stats.jsonl"), arguments.quick)
    for name, samples in time_rounds(calls, arguments.rounds).items():
        row = Row(
            name="stats",
            provider=name,
            shape={"head": heads, "prompt": prompts, "resample": flips if name == "sign flips" else resamples},
            dtype="float64",
            check=checks["flips" if name == "sign flips" else "bootstrap"],
            seconds=Timing.of(samples),
        )
        record.write(row)


if __name__ == "__main__":
    main()
