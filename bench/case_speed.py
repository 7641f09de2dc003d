"""`fast_patch` against one forward per sender (hooks, TransformerLens, nnsight) and against the floor, on one model."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from baselines import HookPatching, LiteralPatching, available_peers
from floor import ROW_COUNTS, Floor
from harness import Check, Record, Row, Timing, relative_error, time_rounds
from memory import PeakMemory
from workloads import Workload, all_senders, build_inputs, build_model, sample_senders

LOGIT_BOUND = 5e-6  # fp32: largest difference over the largest logit
BF16_FLOOR = 1e-3
CHECKED_PROMPTS = 2
EFFECT_BOUND = 2e-4  # fp32: the same for patched - clean, which is smaller than a logit and shows errors more sharply
HEADS_PER_FORWARD = (1, 2, 4, 8, 16)
FAST: dict[str, dict[str, Any]] = {
    "fast_patch": {},
    "fast_patch[reference]": {"backend": "reference"},
    "fast_patch[verify=2]": {"verify": 2},
}


def run_fast_patch(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """The call that is benchmarked: all heads and MLPs, without literal re-runs unless `verify` asks for them."""
    import pyarith

    return pyarith.fast_patch(model, **inputs, progress=False, **{"verify": 0, **options})


def sender_logits(result: Any) -> torch.Tensor:
    """Patched logits `[sender, batch]` of a PatchResult, in the order of `all_senders`."""
    heads, mlps = torch.as_tensor(result.head_logits), torch.as_tensor(result.mlp_logits)
    return torch.cat([heads.flatten(0, 1), mlps])


def spot_check(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], workload: Workload, logits: torch.Tensor
) -> Check:
    """One sender a layer on the first prompts, literally: for batches whose literal run would take hours."""
    first = {name: value[:CHECKED_PROMPTS] for name, value in inputs.items()}
    senders = sample_senders(workload, workload.n_layers)
    order = all_senders(workload)
    found = logits[[order.index(sender) for sender in senders], :CHECKED_PROMPTS]
    error = relative_error(found, HookPatching(model, **first).run(senders))
    return Check("one forward per head with hooks, first prompts", error, LOGIT_BOUND).require(workload.name)


class SpeedCase:
    """One model and batch, the literal competitors on it, and what they must agree on."""

    def __init__(self, workload: Workload, peers: Sequence[str] | None = None) -> None:
        self.workload = workload
        self.model = build_model(workload)
        self.inputs = build_inputs(workload)
        self.floor = Floor(workload, self.model)
        found, missing = available_peers()
        for name, reason in missing.items():
            print(f"{workload.name}: {name} left out: {reason}")
        kinds = {"hooks": HookPatching, **{name: cls for name, cls in found.items() if peers is None or name in peers}}
        self.literal: dict[str, LiteralPatching] = {name: cls(self.model, **self.inputs) for name, cls in kinds.items()}
        self.senders = all_senders(workload)
        self.peer_checked = [*self.sample(1), (0, None), (workload.n_layers // 2, None)]
        self.heads_per_forward = [k for k in HEADS_PER_FORWARD if k <= workload.n_layers * workload.n_heads]

    def fast(self, name: str = "fast_patch") -> Any:
        return run_fast_patch(self.model, self.inputs, **FAST[name])

    def sample(self, heads_per_forward: int) -> list[tuple[int, int | None]]:
        """At least one head sender a layer, a multiple of `heads_per_forward`: what stands for a full literal run."""
        forwards = math.ceil(self.workload.n_layers / heads_per_forward)
        return sample_senders(self.workload, forwards * heads_per_forward)

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(patched logits `[sender, batch]`, clean logits, allowed error) that every competitor is checked against.

        fp32: the complete literal run with hooks. bf16: the same in fp32 on the same weights; allowed is twice the
        error of the literal bf16 run plus a floor, the tolerance rule for kernels. The complete literal run in the
        model's dtype is timed once: it shows what the scaled sample of the rounds stands for.
        """
        literal = self.literal["hooks"]
        start = time.perf_counter()
        logits = literal.run(self.senders)
        self.full_literal_seconds = time.perf_counter() - start
        if self.workload.dtype == "float32":
            return logits, literal.clean_logits, LOGIT_BOUND
        exact = HookPatching(copy.deepcopy(self.model).float(), **self.inputs)
        expected = exact.run(self.senders)
        return expected, exact.clean_logits, 2 * relative_error(logits, expected) + BF16_FLOOR

    def check(
        self, name: str, logits: torch.Tensor, oracle: tuple[torch.Tensor, torch.Tensor, float]
    ) -> tuple[Check, float]:
        """(passed check of the logits, error of the effects) for all senders or, for fewer rows, `peer_checked`."""
        expected, clean, bound = oracle
        if len(logits) != len(self.senders):
            expected = expected[[self.senders.index(sender) for sender in self.peer_checked]]
        check = Check("one forward per head with hooks, fp32", relative_error(logits, expected), bound)
        effect = Check("its effects", relative_error(logits - clean, expected - clean), EFFECT_BOUND)
        if self.workload.dtype == "float32":
            effect.require(f"{self.workload.name}: {name}")
        return check.require(f"{self.workload.name}: {name}"), effect.error

    def best_heads_per_forward(self, name: str) -> tuple[int, dict[int, float]]:
        """(fastest number of heads per forward, seconds per sender for each number tried)."""
        literal = self.literal[name]
        trials = {str(k): lambda k=k: literal.run(sample_senders(self.workload, k), k) for k in self.heads_per_forward}
        seconds = {int(k): min(s) / int(k) for k, s in time_rounds(trials, rounds=1, warmup=1).items()}
        return min(seconds, key=seconds.__getitem__), seconds

    def competitors(self, heads_per_forward: Mapping[str, Sequence[int]]) -> dict[str, Callable[[], object]]:
        """Everything timed in one round: name -> call. Literal names read `provider@heads_per_forward`."""
        calls: dict[str, Callable[[], object]] = {
            **{name: lambda name=name: self.fast(name) for name in FAST},
            "floor_capture": self.floor.capture,
            "floor_replay": self.floor.replay,
        }
        for name, numbers in heads_per_forward.items():
            for k in numbers:
                calls[f"{name}@{k}"] = lambda name=name, k=k: self.literal[name].run(self.sample(k), k)
        return calls


def run(record: Record, workload: Workload, rounds: int, peers: bool = True) -> None:
    """Check, then time all competitors in interleaved rounds, then write one row each; without peers only the hooks."""
    case = SpeedCase(workload)
    if not peers:
        case.literal = {"hooks": case.literal["hooks"]}
        case.heads_per_forward = [1]
    oracle = case.oracle()
    results = {name: case.fast(name) for name in FAST}
    checks = {name: case.check(name, sender_logits(result), oracle) for name, result in results.items()}
    tried, chosen = {}, {}
    for name, literal in case.literal.items():
        best, tried[name] = case.best_heads_per_forward(name)
        chosen[name] = sorted({1, best})
        for k in chosen[name]:
            checks[f"{name}@{k}"] = case.check(f"{name}@{k}", literal.run(case.peer_checked, k), oracle)
    calls = case.competitors(chosen)
    peaks = {name: _peak(call) for name, call in calls.items()}
    samples = time_rounds(calls, rounds, warmup=0)
    floor = _write_floor(record, case, samples)
    seconds = _write_literal(record, case, samples, checks, peaks, tried, floor["capture_seconds"])
    for name, result in results.items():
        timing = Timing.of(samples[name])
        extra = {
            "over_floor": timing.median / floor["seconds"],
            "over_floor_best": timing.median / floor["best_seconds"],
            "flop_bound": workload.literal_flop / workload.flop,
            **{f"speedup_over_{other}": median / timing.median for other, median in seconds.items()},
            "head_forwards_share": workload.n_layers * workload.n_heads / workload.n_senders,
            "senders_per_second": workload.n_senders * workload.batch / timing.median,
            "effect_error": checks[name][1],
            "noise_floor": float(max(result.noise_floor)),
            "settings": result.settings,
        }
        record.write(
            Row(
                **_common(workload),
                provider=name,
                check=checks[name][0],
                seconds=timing,
                flop=workload.flop,
                bytes=workload.bytes,
                share_of_roofline=floor["seconds"] / timing.median,
                peak_private_bytes=peaks[name],
                extra=extra,
            )
        )


def _common(workload: Workload) -> dict[str, Any]:
    return {"name": workload.name, "shape": workload.shape, "dtype": workload.dtype}


def _peak(call: Callable[[], object]) -> int:
    with PeakMemory() as memory:
        call()
    return memory.private_bytes


def _write_literal(
    record: Record,
    case: SpeedCase,
    samples: Mapping[str, Sequence[float]],
    checks: Mapping[str, tuple[Check, float]],
    peaks: Mapping[str, int],
    tried: Mapping[str, Mapping[int, float]],
    capture_seconds: float,
) -> dict[str, float]:
    """One row per literal competitor, its sample scaled to all senders; returns the medians by name."""
    work = case.workload
    ceiling = capture_seconds * work.literal_flop / (2 * work.batch * work.forward_flop)
    medians = {}
    for name in (name for name in samples if "@" in name):
        provider, k = name.split("@")
        n_sampled = len(case.sample(int(k)))
        timing = Timing.of(samples[name]).scaled(work.n_senders / n_sampled)
        medians[name] = timing.median
        extra = {
            "effect_error": checks[name][1],
            "senders_timed": n_sampled,
            "senders": work.n_senders,
            "seconds_per_sender_by_heads_per_forward": dict(tried[provider]),
        }
        if name == "hooks@1":
            extra["full_run_seconds"] = case.full_literal_seconds
        record.write(
            Row(
                **_common(work),
                provider=name,
                check=checks[name][0],
                seconds=timing,
                flop=work.literal_flop,
                share_of_roofline=ceiling / timing.median,
                peak_private_bytes=peaks[name],
                extra=extra,
            )
        )
    return medians


def _write_floor(record: Record, case: SpeedCase, samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The row of the floor; returns its seconds, those of the captures alone and those at the best rates."""
    work, sweep = case.workload, _sweep(case.floor)
    capture, replay = (statistics.median(samples[name]) for name in ("floor_capture", "floor_replay"))
    best = case.floor.best_seconds(sweep, capture, replay)
    extra = {
        "capture_flop_per_s": 2 * work.batch * work.forward_flop / capture,
        "replay_flop_per_s": work.replay_flop / replay,
        "floor_best_seconds": best,
        "sweep_seconds": {f"{kind} {rows}": value for (kind, rows), value in sweep.items()},
    }
    timing = Timing.of([a + b for a, b in zip(samples["floor_capture"], samples["floor_replay"], strict=True)])
    check = case.floor.check()
    record.write(Row(**_common(work), provider="floor", check=check, seconds=timing, flop=work.flop, extra=extra))
    return {"seconds": capture + replay, "capture_seconds": capture, "best_seconds": best}


def _sweep(floor: Floor) -> dict[tuple[str, int], float]:
    """Best of three rounds for the projections of all layers at each row count."""
    calls = {}
    for rows in ROW_COUNTS:
        calls[f"attention {rows}"], calls[f"mlp {rows}"] = floor.at_rows(rows)
    return {
        (name.split()[0], int(name.split()[1])): min(seconds) for name, seconds in time_rounds(calls, rounds=3).items()
    }
