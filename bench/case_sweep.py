"""`ablation_sweep` over every head against one forward per head (hooks, TransformerLens, nnsight) and the floor.

The floor is the matrix products that an exact sweep cannot do without, at the rate of this machine in the same rounds:
one clean forward; from a head's layer on, its variant's rows through that layer's MLP and the later blocks (all
positions, or END alone), of the last layer's MLP END alone. Attention scores, norms, W_O rows and head are left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from baselines import Sender, available_peers
from baselines_ablation import ABLATIONS, LiteralAblation
from floor import Floor
from harness import Check, Record, Row, Timing, relative_error, time_rounds
from workloads import Workload, build_inputs, build_model, sample_senders

LOGIT_BOUND = 5e-6  # fp32: largest difference over the largest logit
POSITIONS = ("all", "end")
HEADS_PER_FORWARD = (1, 2, 4, 8, 16)
CHECKED_A_LAYER = 2
FLOOR_BLOCKS = (1024, 2048)  # rows of a product at a time; the faster one is the floor


class SweepFloor(Floor):
    """The matrix products of a sweep over every head with a model's own weights."""

    def rows(self, positions: str) -> Iterator[tuple[int, int]]:
        """(rows of the attention projections, rows of the MLP) of each layer."""
        work = self.workload
        clean = work.batch * work.pos
        carried = clean if positions == "all" else work.batch
        for layer in range(work.n_layers):
            last = layer == work.n_layers - 1
            mlp = work.n_heads * (layer + 1) * (work.batch if last else carried)
            yield clean + work.n_heads * layer * carried, (work.batch if last else clean) + mlp

    def flop(self, positions: str) -> int:
        d = self.workload.d_model
        return sum(attention * 8 * d**2 + mlp * self.workload.mlp_flop for attention, mlp in self.rows(positions))

    def sweep(self, positions: str, block: int = FLOOR_BLOCKS[0]) -> None:
        for (attention, mlp), (attention_rows, mlp_rows) in zip(self._layers, self.rows(positions), strict=True):
            for rows in _blocks(attention_rows, block):
                self._attention(attention, rows)
            for rows in _blocks(mlp_rows, block):
                self._mlp(mlp, rows)


def _blocks(rows: int, block: int) -> Iterator[int]:
    while rows > 0:
        yield min(rows, block)
        rows -= block


class SweepCase:
    """One model and batch, the literal competitors on it, and what they must agree on."""

    def __init__(self, workload: Workload, peers: bool) -> None:
        self.workload, self.model = workload, build_model(workload)
        inputs = build_inputs(workload)
        self.clean, self.answers = inputs["clean"], inputs["answers"]
        self.floor = SweepFloor(workload, self.model)
        found, missing = available_peers() if peers else ({}, {})
        for name, reason in missing.items():
            print(f"{workload.name}: {name} left out: {reason}")
        self.literal = {
            (name, positions): cls(self.model, self.clean, self.answers, positions)
            for name, cls in ABLATIONS.items()
            if name == "hooks" or name in found
            for positions in (POSITIONS if name == "hooks" else ("all",))
        }
        self._expected: dict[str, torch.Tensor] = {}
        self.checked = sample_senders(workload, CHECKED_A_LAYER * workload.n_layers)
        n_heads = workload.n_layers * workload.n_heads
        self.heads_per_forward = [k for k in HEADS_PER_FORWARD if k <= n_heads] if peers else [1]

    def sweep(self, positions: str) -> Any:
        import pyarith

        return pyarith.ablation_sweep(
            self.model, self.clean, self.answers, positions=positions, verify=0, progress=False
        )

    def sample(self, heads_per_forward: int) -> list[Sender]:
        """At least one head a layer, a multiple of `heads_per_forward`: what stands for all heads."""
        return sample_senders(self.workload, math.ceil(self.workload.n_layers / heads_per_forward) * heads_per_forward)

    def check(self, name: str, logits: torch.Tensor, positions: str) -> Check:
        """Passed check of logits `[checked head, batch]` against hooks, one head a forward."""
        if positions not in self._expected:
            self._expected[positions] = self.literal["hooks", positions].run(self.checked)
        found = relative_error(logits, self._expected[positions])
        return Check(f"one forward per head with hooks, {len(self.checked)} heads", found, LOGIT_BOUND).require(name)

    def of_result(self, result: Any) -> torch.Tensor:
        return torch.as_tensor(result.logits)[[result.of(sender) for sender in self.checked]]

    def best(self, literal: LiteralAblation) -> tuple[int, dict[int, float]]:
        """(fastest number of heads per forward, seconds per head for each number tried)."""
        calls = {str(k): lambda k=k: literal.run(sample_senders(self.workload, k), k) for k in self.heads_per_forward}
        seconds = {int(k): min(s) / int(k) for k, s in time_rounds(calls, rounds=1).items()}
        return min(seconds, key=seconds.__getitem__), seconds


def run(record: Record, workload: Workload, rounds: int, peers: bool = True) -> None:
    """Check, then time all competitors in interleaved rounds, then write one row each with its ratios."""
    case = SweepCase(workload, peers)
    results = {positions: case.sweep(positions) for positions in POSITIONS}
    checks = {
        f"sweep {where}": case.check(f"sweep {where}", case.of_result(results[where]), where) for where in POSITIONS
    }
    calls: dict[str, Callable[[], object]] = {
        **{f"sweep {where}": lambda where=where: case.sweep(where) for where in POSITIONS},
        **{
            f"floor {where} {block}": lambda where=where, block=block: case.floor.sweep(where, block)
            for where in POSITIONS
            for block in FLOOR_BLOCKS
        },
    }
    tried: dict[str, dict[int, float]] = {}
    n_timed: dict[str, int] = {}
    for (name, where), literal in case.literal.items():
        best, seconds = case.best(literal) if where == "all" else (1, {})
        for k in sorted({1, best}):
            key = f"{name}@{k} {where}"
            tried[key], n_timed[key] = seconds, len(case.sample(k))
            checks[key] = case.check(key, literal.run(case.checked, k), where)
            calls[key] = lambda literal=literal, k=k: literal.run(case.sample(k), k)
    samples = time_rounds(calls, rounds, warmup=0)
    _write(record, case, results, samples, checks, tried, n_timed)


def _write(
    record: Record,
    case: SweepCase,
    results: Mapping[str, Any],
    samples: Mapping[str, list[float]],
    checks: Mapping[str, Check],
    tried: Mapping[str, Mapping[int, float]],
    n_timed: Mapping[str, int],
) -> None:
    work = case.workload
    n_heads = work.n_layers * work.n_heads
    common = {"shape": work.shape, "dtype": work.dtype}
    medians: dict[str, dict[str, float]] = {where: {} for where in POSITIONS}
    for key, heads in n_timed.items():
        name, where = key.split()
        timing = Timing.of(samples[key]).scaled(n_heads / heads)
        medians[where][name] = timing.median
        extra = {"heads_timed": heads, "heads": n_heads, "seconds_per_head_by_heads_per_forward": dict(tried[key])}
        row = Row(f"sweep_{where}", name, check=checks[key], seconds=timing, extra=extra, **common)
        record.write(row)
    for where in POSITIONS:
        floors = {block: Timing.of(samples[f"floor {where} {block}"]) for block in FLOOR_BLOCKS}
        block = min(floors, key=lambda rows: floors[rows].median)
        floor, own = floors[block], floors[block].median
        flop = float(case.floor.flop(where))
        extra = {
            "rows_a_product": block,
            "flop_per_s": flop / floor.median,
            "flop_bound": n_heads * work.batch * work.forward_flop / flop,
        }
        name = f"sweep_{where}"
        record.write(Row(name, "floor", check=case.floor.check(), seconds=floor, flop=flop, extra=extra, **common))
        timing = Timing.of(samples[f"sweep {where}"])
        extra = {
            "over_floor": timing.median / own,
            **{f"speedup_over_{other}": median / timing.median for other, median in medians[where].items()},
            "heads_per_second": n_heads * work.batch / timing.median,
            "noise_floor": results[where].noise_floor,
            "settings": results[where].settings,
        }
        record.write(
            Row(
                name,
                "ablation_sweep",
                check=checks[f"sweep {where}"],
                seconds=timing,
                flop=flop,
                share_of_roofline=own / timing.median,
                extra=extra,
                **common,
            )
        )
