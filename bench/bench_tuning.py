"""A step of Precise SFT against full fine-tuning and LoRA, on one model shape, interleaved in one process.

    python bench/bench_tuning.py [--quick] [--rounds N] [--out FILE]

12 layers x 12 heads, batch 8 x 128 tokens, loss on all tokens; trained are 16 heads in layers 6-8 with their keys and
values. A step is forward, backward, update and clearing the gradients. Competitors: full fine-tuning with torch's
fused AdamW and the model's own loss (``full``), the same without the update (``full backward``), peft LoRA of rank 16
on q, k, v, o of all layers (``lora``), ``SelectiveTuner`` with the model's own loss (``own loss of the model``) and
with ``tuner.loss`` (``tuner``), and the latter from the frozen-prefix cache, as from the second epoch on (``cached``).

FLOP of the matrix products of a step, with S tokens, A = n_layers (8 d^2 + 6 d d_mlp) a token, U = 2 d d_vocab:

    full    3 S (A + U)
    tuner   S (2 U + A + (n_layers - first_layer) / n_layers A)      the slices' own gradients left out: below 1 %
    cached  S (2 U + 2 (n_layers - first_layer) / n_layers A)
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Check, Record, Row, Timing, relative_error, time_rounds
from memory import PeakMemory
from workloads import Workload, build_model, quick

GRADIENT_BOUND = 2e-4  # fp32, largest difference over the largest entry
LOSS_BOUND = 2e-6
RANK = 16
CASE = Workload("tuning", 12, 12, 768, 2048, 32000, batch=8, pos=128)


def chosen_heads(work: Workload) -> list[tuple[int, int]]:
    """16 heads of layers 6-8, or as many of the middle layers of a small model."""
    first = work.n_layers // 2
    layers = range(first, min(first + 3, work.n_layers))
    return [(layer, head) for head in range(6) for layer in layers if head < work.n_heads][:16]


class TuningCase:
    """One model per competitor, all with the same weights, and the batch."""

    def __init__(self, work: Workload) -> None:
        from peft import LoraConfig, get_peft_model

        import pyarith
        from pyarith.tuning import PrefixCache

        self.work = work
        self.model = build_model(work).train()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(work.d_vocab, (work.batch, work.pos), generator=generator)
        self.batch = {"input_ids": ids, "labels": ids}
        self.full = copy.deepcopy(self.model).requires_grad_(True)
        adapter = LoraConfig(r=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        self.lora = get_peft_model(copy.deepcopy(self.model), adapter)
        self.tuner = pyarith.SelectiveTuner(self.model, chosen_heads(work))
        self.cache = PrefixCache(self.tuner, memory="1GiB")
        self.optimizers = {
            "full": torch.optim.AdamW(self.full.parameters(), lr=1e-6, fused=True),
            "lora": torch.optim.AdamW([p for p in self.lora.parameters() if p.requires_grad], lr=1e-6, fused=True),
            "tuner": self.tuner.optimizer(lr=1e-6),
        }

    def full_backward(self) -> None:
        self.full(**self.batch, use_cache=False).loss.backward()
        self.optimizers["full"].zero_grad()

    def step(self, name: str, loss: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

        return run

    def losses(self) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Competitor -> (whose optimizer, the loss)."""
        return {
            "full": ("full", lambda: self.full(**self.batch, use_cache=False).loss),
            "lora": ("lora", lambda: self.lora(**self.batch, use_cache=False).loss),
            "own loss of the model": ("tuner", lambda: self.model(**self.batch, use_cache=False).loss),
            "tuner": ("tuner", lambda: self.tuner.loss(**self.batch)),
            "cached": ("tuner", self.cached_loss),
        }

    def cached_loss(self) -> Any:
        with self.cache:
            return self.tuner.loss(**self.batch)

    def gradients(self, loss: Callable[[], Any]) -> torch.Tensor:
        loss().backward()
        found = torch.cat([value.grad.flatten() for value in self.tuner.parameters()])
        self.optimizers["tuner"].zero_grad()
        return found

    def checks(self) -> dict[str, Check]:
        """Losses of all, and gradients of the slices against full fine-tuning's at their entries."""
        losses = self.losses()
        want = losses["full"][1]()
        want.backward()
        grads = dict(self.full.named_parameters())
        parts = []
        for one in self.tuner.slices:
            grad = grads[one.name].grad
            parts.append(torch.cat([grad.narrow(one.dim, a, b - a) for a, b in one.ranges], one.dim).flatten())
        expected = torch.cat(parts)
        self.optimizers["full"].zero_grad()
        checks = {"full": Check("itself", 0.0, 0.0), "full backward": Check("itself", 0.0, 0.0)}
        for name in ("own loss of the model", "tuner", "cached", "cached"):  # twice: a miss, then a hit
            error = relative_error(self.gradients(losses[name][1]), expected)
            checks[name] = Check("gradients of full fine-tuning", error, GRADIENT_BOUND).require(name)
        with torch.no_grad():
            error = relative_error(losses["lora"][1](), want)
        checks["lora"] = Check("loss of full fine-tuning", error, LOSS_BOUND).require("lora")
        served = self.cache.stats()["served"]
        if served < 1:
            raise ValueError(f"cached: expected batches served by the prefix cache, got {served}")
        return checks

    def flop(self) -> dict[str, float]:
        work = self.work
        tokens, above = work.batch * work.pos, 1 - self.tuner.first_layer / work.n_layers
        layers = work.n_layers * (8 * work.d_model**2 + work.mlp_flop)
        head = 2 * work.d_model * work.d_vocab
        tuner = tokens * (2 * head + (1 + above) * layers)
        return {
            "full": 3.0 * tokens * (layers + head),
            "full backward": 3.0 * tokens * (layers + head),
            "own loss of the model": tuner,
            "tuner": tuner,
            "cached": tokens * (2 * head + 2 * above * layers),
        }

    def state_bytes(self) -> dict[str, int]:
        """Bytes that gradients and optimizer state take after a step, found by looking."""
        self.losses()["tuner"][1]().backward()
        self.optimizers["tuner"].step()
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        for state in self.optimizers["tuner"].state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        self.optimizers["tuner"].zero_grad()
        sizes = self.tuner.state_bytes
        found = sum(value.numel() * value.element_size() for value in held)
        return {"gradients_and_state": found, "of_the_slices": sizes["gradients"] + sizes["adamw"]}


def run(record: Record, work: Workload, rounds: int) -> None:
    """Check, then time all in interleaved rounds, then peak memory, then the rows with their ratios."""
    case = TuningCase(work)
    checks, losses, flop = case.checks(), case.losses(), case.flop()
    calls: dict[str, Callable[[], object]] = {"full backward": case.full_backward}
    calls |= {name: case.step(owner, loss) for name, (owner, loss) in losses.items()}
    samples = time_rounds(calls, rounds)
    timings = {name: Timing.of(values) for name, values in samples.items()}
    peaks = {}
    for name, call in calls.items():
        with PeakMemory() as peak:
            call()
        peaks[name] = peak.private_bytes
    state = case.state_bytes()
    for name, timing in timings.items():
        extra: dict[str, Any] = {
            f"over_{other.replace(' ', '_')}": timing.median / timings[other].median
            for other in ("full", "full backward", "lora")
            if other != name
        }
        if name in flop:
            extra["flop_over_full"] = flop[name] / flop["full"]
        if name == "tuner":
            extra |= {"trained": case.tuner.n_parameters, **state}
            extra["state_over_slices"] = state["gradients_and_state"] / state["of_the_slices"]
        record.write(
            Row(
                "tuning",
                name,
                shape={**work.shape, "heads": len(case.tuner.heads), "first_layer": case.tuner.first_layer},
                dtype=work.dtype,
                check=checks[name],
                seconds=timing,
                flop=flop.get(name),
                peak_private_bytes=peaks[name],
                extra=extra,
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, help="interleaved rounds [7, or 2 with --quick]")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    record = Record(arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "tuning.jsonl"), arguments.quick)
    work = replace(quick(CASE), n_layers=6) if arguments.quick else CASE
    run(record, work, arguments.rounds or (2 if arguments.quick else 7))


if __name__ == "__main__":
    main()
