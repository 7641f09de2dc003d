"""Path patching of all heads and MLPs: `fast_patch` against literal hooks, TransformerLens, nnsight and the floor.

    python bench/bench_discovery.py [--case NAME ...] [--quick] [--rounds N] [--out FILE]
    pytest bench/bench_discovery.py --benchmark-only        # the quick size under pytest-benchmark

Every case asserts that results agree before anything is timed, and appends rows to bench/results/discovery.jsonl (with
--quick, whose figures say nothing about speed, to bench/results/quick.jsonl, which is not committed).
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import case_fewshot
import case_memory
import case_speed
import case_startup
import case_sweep
from harness import RESULTS, Record
from workloads import FULL, quick

RUNNERS: dict[str, Callable[..., None]] = {
    "fewshot": case_fewshot.run,
    "memory": case_memory.run,
}
SPEED = ("llama12x12", "llama12x12_long", "llama12x12_bf16", "small8x8")
CASES = (*SPEED, *RUNNERS, "sweep", "startup")
ROUNDS = {"small8x8": 15, "startup": 9, "fewshot": 5, "memory": 3, "sweep": 3}
QUICK_ROUNDS = 2
DEFAULT_ROUNDS = 7


def run_case(name: str, record: Record, rounds: int, small: bool, peers: bool = True) -> None:
    """One case, by its name in `CASES`."""
    if name == "startup":
        case_startup.run(record, rounds)
    else:
        full = FULL["llama12x12" if name == "sweep" else name]
        workload = quick(full) if small else full
        if name in SPEED or name == "sweep":
            (case_sweep if name == "sweep" else case_speed).run(record, workload, rounds, peers)
        else:
            RUNNERS[name](record, workload, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: by case)")
    parser.add_argument("--no-peers", action="store_true", help="speed cases: literal hooks, one head a forward, only")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    default = RESULTS / ("quick.jsonl" if arguments.quick else "discovery.jsonl")
    record = Record(arguments.out or default, arguments.quick)
    for name in arguments.case:
        rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS.get(name, DEFAULT_ROUNDS))
        run_case(name, record, rounds, arguments.quick, not arguments.no_peers)


@cache
def quick_case() -> tuple[case_speed.SpeedCase, Any]:
    """The quick case and its oracle, once for all parametrised benchmarks."""
    case = case_speed.SpeedCase(quick(FULL["llama12x12"]))
    return case, case.oracle()


def pytest_generate_tests(metafunc: Any) -> None:
    """One benchmark per competitor; peers that are not installed have none."""
    case, _ = quick_case()
    calls = case.competitors({name: (1, case.heads_per_forward[-1]) for name in case.literal})
    metafunc.parametrize("competitor", list(calls))


def test_discovery(benchmark: Any, competitor: str) -> None:
    """pytest-benchmark: results checked against the complete literal run, then timed."""
    case, oracle = quick_case()
    provider = competitor.split("@")[0]
    if provider in case.literal:
        case.check(competitor, case.literal[provider].run(case.peer_checked), oracle)
    elif competitor.startswith("floor"):
        case.floor.check().require(competitor)
    else:
        case.check(competitor, case_speed.sender_logits(case.fast(competitor)), oracle)
    calls = case.competitors({name: (1, case.heads_per_forward[-1]) for name in case.literal})
    benchmark(calls[competitor])


if __name__ == "__main__":
    main()
