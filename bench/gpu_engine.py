"""Stages "fast_patch" and "more": the whole call at the shapes of real models, against literal hooks and the GEMM rate.

Random weights in bf16, all heads and MLPs, verify=0. Before anything is timed, the effects of one head a layer are held
against literal hooks on an fp32 copy of the model: their error must be within the noise floor that the run itself
reports. One corrupted token moves a random model's heads by little more than that floor, so the same is asked on
prompts that are corrupted everywhere but at both ends, where a wrong head would show.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from baselines import HookPatching, Sender
from gpu_engine_checks import Prepared, patch
from gpu_ops import gemm_rate, size
from gpu_work import Bench, Case
from harness import Check, Row, Timing, relative_error
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import Workload, all_senders, build_inputs, sample_senders

REPETITIONS = 3
CHECKED_PROMPTS = 4
LOUD = 0.9  # largest noise floor over the heads' effects, and largest error: no effect at all is an error of 1
HEADS_PER_FORWARD = (1, 2, 4, 8)
NEEDED = ("fast_patch llama auto bfloat16",)
BUDGETS = ("512MiB", "1GiB", "2GiB", "4GiB", "8GiB")
ROW_BLOCKS = (2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Grouped(Workload):
    """A workload whose key and value heads are fewer than its heads."""

    n_kv_heads: int = 32
    dtype: str = "bfloat16"

    @property
    def forward_flop(self) -> int:
        attention = 4 * self.d_model**2 * (1 + self.n_kv_heads / self.n_heads)
        return self.pos * self.n_layers * (int(attention) + self.mlp_flop)


@dataclass(frozen=True)
class Target:
    seconds: float = math.inf
    over_one_per_head: float = 0.0
    gemm_share: float = 0.75
    extra_bytes: int = 4 * 2**30


LLAMA2 = Grouped("llama2-7b, 16 tokens", 32, 32, 4096, 11008, 32000, batch=100, pos=16)
LLAMA2_LONG = replace(LLAMA2, name="llama2-7b, 64 tokens", batch=25, pos=64)
LLAMA3 = Grouped("llama3-8b, 16 tokens", 32, 32, 4096, 14336, 128256, batch=100, pos=16, n_kv_heads=8)


def cases() -> list[Case]:
    first, long, grouped = Target(0.9, 35), Target(over_one_per_head=100), Target()
    planned = [
        Case("fast_patch", LLAMA2.name, partial(compare, full=LLAMA2, target=first), NEEDED),
        Case("fast_patch", LLAMA2_LONG.name, partial(compare, full=LLAMA2_LONG, target=long), NEEDED),
    ]
    for budget in BUDGETS:
        planned.append(Case("more", f"memory_budget {budget}", partial(at_budget, budget=budget), (LLAMA2.name,)))
    for rows in ROW_BLOCKS:
        planned.append(Case("more", f"row block {rows}", partial(at_rows, rows=rows), (LLAMA2.name,)))
    return [*planned, Case("more", LLAMA3.name, partial(compare, full=LLAMA3, target=grouped), NEEDED)]


def workload(bench: Bench, full: Grouped) -> Grouped:
    if not bench.tiny:
        return full
    heads, kv_heads = 4, 4 * full.n_kv_heads // full.n_heads
    sizes = dict(n_layers=3, n_heads=heads, n_kv_heads=kv_heads, d_model=64, d_mlp=176, d_vocab=128, batch=6)
    return replace(full, **sizes, pos=full.pos // 2)


def model_of(bench: Bench, work: Grouped) -> LlamaForCausalLM:
    """The random model of a workload, made on the device and kept for the next case of the same shape."""
    key = ("model", work.n_kv_heads, work.d_mlp, work.d_vocab)
    if key not in bench.cache:
        bench.forget()  # two of these models fit no device with the copies that the checks make
        bench.cache[key] = random_llama(work, bench)
    return bench.cache[key]


def random_llama(work: Grouped, bench: Bench) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=work.d_vocab,
        hidden_size=work.d_model,
        intermediate_size=work.d_mlp,
        num_hidden_layers=work.n_layers,
        num_attention_heads=work.n_heads,
        num_key_value_heads=work.n_kv_heads,
        max_position_embeddings=1024,
        initializer_range=0.6 / work.d_model**0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(bench.seed)  # transformers initialises from the global state
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, work.dtype))
    try:
        with torch.device(bench.device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model


def inputs_of(bench: Bench, work: Grouped) -> dict[str, torch.Tensor]:
    return {name: value.to(bench.device) for name, value in build_inputs(work, bench.seed).items()}


def compare(bench: Bench, full: Grouped, target: Target) -> None:
    """Check one workload, then time fast_patch and the literal hooks on it."""
    work = workload(bench, full)
    model, inputs = model_of(bench, work), inputs_of(bench, work)
    checks = check(bench, work, model, inputs)
    results: list[Any] = []
    peak = bench.clock.peak_bytes(lambda: patch(model, inputs))
    timing = bench.clock.wall(lambda: results.append(patch(model, inputs)), REPETITIONS)
    result = results[-1]
    rate = gemm_rate(bench)
    share = None if rate is None else work.flop / rate / timing.median
    bench.write(
        Row(
            name=work.name,
            provider="fast_patch",
            shape=work.shape,
            dtype=work.dtype,
            check=checks["fast_patch"],
            seconds=timing,
            flop=work.flop,
            share_of_roofline=share,
            peak_private_bytes=peak,
            extra={"noise_floor": float(result.noise_floor.max()), "settings": result.settings},
        )
    )
    parts = result.settings["seconds"]
    text = f"{timing.median:.3f} s (capture {parts['capture']:.3f}, replay {parts['replay']:.3f})"
    goal = f"<= {target.seconds} s" if math.isfinite(target.seconds) else ""
    bench.figure(work.name, text, goal, timing.median <= target.seconds if goal else None)
    if share is not None:
        reached = share >= target.gemm_share
        bench.figure("  share of the GEMM rate", f"{share:.1%}", f">= {target.gemm_share:.0%}", reached)
    goal = f"<= {target.extra_bytes / 2**30:.0f} GiB"
    bench.figure("  extra memory", f"{peak / 2**30:.2f} GiB", goal, peak <= target.extra_bytes)
    literal_rows(bench, work, HookPatching(model, **inputs), checks, timing, target)


def check(bench: Bench, work: Grouped, model: LlamaForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, Check]:
    """fast_patch and hooks in bf16 against hooks in fp32, on the first prompts."""
    exact = copy.deepcopy(model).float()
    loud = {**inputs, "corrupted": inputs["corrupted"].clone()}
    loud["corrupted"][:, 1:-1] = (inputs["clean"][:, 1:-1] + 1) % work.d_vocab
    result = patch(model, loud)
    senders = strongest(work, result)
    effects = Effects.of(work, exact, loud, senders)
    floor = float(result.noise_floor.max())
    if not floor < LOUD * rms(effects.heads):
        raise ValueError(f"{work.name}: effects drown in rounding, a check would pass whatever came out")
    checks = {"fast_patch": effects.check(work, fast_effects(work, result, senders).to(bench.device), floor)}
    for k in HEADS_PER_FORWARD:
        # no identity rows: its effects are differences between two kinds of run, with an error of their own
        found = Effects.of(work, model, loud, senders, k)
        checks[f"hooks@{k}"] = effects.check(work, torch.cat([found.heads, found.mlps]), 2 * floor)
    quiet, result = Effects.of(work, exact, inputs, senders), patch(model, inputs)
    quiet.check(work, fast_effects(work, result, senders).to(bench.device), float(result.noise_floor.max()))
    return checks


def strongest(work: Grouped, result: Any) -> list[Sender]:
    """The head of each layer that changes the logit most, by the result that is to be checked, and three MLPs."""
    change = abs(result.head_logits - result.identity_logits[:, None])[..., :CHECKED_PROMPTS].mean(-1)
    heads: list[Sender] = [(layer, int(head)) for layer, head in enumerate(change.argmax(1))]
    return [*heads, (0, None), (work.n_layers // 2, None), (work.n_layers - 1, None)]


@dataclass(frozen=True)
class Effects:
    """Changes of the answer's logit by literal hooks, [sender, batch], one head a layer and then some MLPs."""

    heads: torch.Tensor
    mlps: torch.Tensor

    @classmethod
    def of(
        cls, work: Grouped, model: LlamaForCausalLM, inputs: dict[str, torch.Tensor], senders: list[Sender], k: int = 1
    ) -> "Effects":
        literal = HookPatching(model, **{name: value[:CHECKED_PROMPTS] for name, value in inputs.items()})
        effects = literal.run(senders, k) - literal.clean_logits
        return cls(effects[: work.n_layers], effects[work.n_layers :])

    def check(self, work: Grouped, found: torch.Tensor, floor: float) -> Check:
        """Rms error of heads and of MLPs, the one that comes closer to its bound, relative to the heads' rms effect.

        The rms error may be the noise floor (a largest value over prompts and layers, so several times its rms), and
        rounding in proportion to the effect's own size.
        """
        scale, eps = rms(self.heads), torch.finfo(torch.bfloat16).eps
        parts = zip((self.heads, self.mlps), found.split([len(self.heads), len(self.mlps)]), strict=True)
        checks = []
        for expected, value in parts:
            bound = min(LOUD, (floor + eps * rms(expected)) / scale)
            checks.append(Check("literal hooks in fp32", rms(value - expected) / scale, bound))
        return max(checks, key=lambda c: c.error / c.bound).require(work.name)


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def fast_effects(work: Grouped, result: Any, senders: list[Sender]) -> torch.Tensor:
    """Those of a PatchResult, in the order of the senders."""
    heads = torch.as_tensor(result.head_logits - result.identity_logits[:, None]).flatten(0, 1)
    both = torch.cat([heads, torch.as_tensor(result.mlp_logits - result.mlp_identity_logits)])
    order = all_senders(work)
    return both[[order.index(sender) for sender in senders], :CHECKED_PROMPTS]


def literal_rows(
    bench: Bench, work: Grouped, literal: HookPatching, checks: dict[str, Check], fast: Timing, target: Target
) -> None:
    """The literal hooks on one head a layer, scaled to all senders, one and more heads per forward."""
    timings = {}
    for k in HEADS_PER_FORWARD:
        senders = sample_senders(work, k * math.ceil(work.n_layers / k))
        measured = bench.clock.wall(partial(literal.run, senders, k), 1)
        timings[k] = measured.scaled(work.n_senders / len(senders))
        bench.write(
            Row(
                name=work.name,
                provider=f"hooks@{k}",
                shape=work.shape,
                dtype=work.dtype,
                check=checks[f"hooks@{k}"],
                seconds=timings[k],
                flop=work.literal_flop,
                extra={"senders_timed": len(senders), "speedup": timings[k].median / fast.median},
            )
        )
    best = min(timings, key=lambda k: timings[k].median)
    ratio = timings[1].median / fast.median
    goal = f">= {target.over_one_per_head:.0f}x" if target.over_one_per_head else ""
    what = f"{timings[1].median:.1f} s by hooks, one forward per sender: {ratio:.1f}x"
    bench.figure("  literal", what, goal, ratio >= target.over_one_per_head if goal else None)
    what = f"{timings[best].median:.1f} s at their best, {best} per forward: {timings[best].median / fast.median:.1f}x"
    bench.figure("  literal", what)


def default_logits(bench: Bench, model: LlamaForCausalLM, inputs: dict[str, torch.Tensor]) -> tuple[Any, float]:
    """(patched logits of a run as planned by default, twice its noise floor relative to the largest logit)."""
    if "default" not in bench.cache:
        result = patch(model, inputs)
        bound = 2 * float(result.noise_floor.max()) / abs(result.head_logits).max()
        bench.cache["default"] = result.head_logits, max(bound, torch.finfo(torch.float32).eps)
    return bench.cache["default"]


def at_budget(bench: Bench, budget: str) -> None:
    """The same work in blocks that another memory budget allows."""
    work = workload(bench, LLAMA2)
    model, inputs = model_of(bench, work), inputs_of(bench, work)
    expected, bound = default_logits(bench, model, inputs)
    result = patch(model, inputs, memory_budget=budget)
    checked = Check("default blocks", relative_error(result.head_logits, expected), bound).require(bench.case)
    timing = bench.clock.wall(lambda: patch(model, inputs, memory_budget=budget), REPETITIONS)
    peak = bench.clock.peak_bytes(lambda: patch(model, inputs, memory_budget=budget))
    plan = result.settings["plan"]
    bench.write(
        Row(
            name=work.name,
            provider=bench.case,
            shape=work.shape,
            dtype=work.dtype,
            check=checked,
            seconds=timing,
            flop=work.flop,
            peak_private_bytes=peak,
            extra={"plan": plan, "seconds": result.settings["seconds"]},
        )
    )
    blocks = f"{plan['prompts']} prompts, {plan['rows']} rows"
    bench.figure(bench.case, f"{timing.median:.3f} s, {peak / 2**30:.2f} GiB, blocks of {blocks}")


def at_rows(bench: Bench, rows: int) -> None:
    """The replay alone, of all prompts at once, with that many rows per MLP call."""
    work = workload(bench, LLAMA2)
    model, inputs = model_of(bench, work), inputs_of(bench, work)
    if "prepared" not in bench.cache:
        bench.cache["prepared"] = Prepared(model, inputs)
    prepared: Prepared = bench.cache["prepared"]
    block = size(bench, rows, rows // 512)
    expected, bound = default_logits(bench, model, inputs)
    found = rows_of_heads(prepared, prepared.run(block))
    checked = Check("default blocks", relative_error(found, expected), bound).require(bench.case)
    timing = bench.clock.rounds({"replay": lambda: prepared.run(block)}, REPETITIONS, warmup=0)["replay"]
    rate = gemm_rate(bench)
    share = None if rate is None else work.replay_flop / rate / timing.median
    bench.write(
        Row(
            name=work.name,
            provider=bench.case,
            shape={**work.shape, "row_block": block},
            dtype=work.dtype,
            check=checked,
            seconds=timing,
            flop=work.replay_flop,
            share_of_roofline=share,
        )
    )
    bench.figure(
        bench.case, f"replay {timing.median:.3f} s" + ("" if share is None else f", {share:.1%} of the GEMM rate")
    )


def rows_of_heads(prepared: Prepared, logits: torch.Tensor) -> torch.Tensor:
    """The heads' part of a replay's rows, [layer, head, batch]."""
    heads = [entry for entry in prepared.replay.entries if entry is not None and entry.head_layer is not None]
    return torch.stack([logits[entry.start : entry.start + len(entry.heads), :, 0] for entry in heads]).cpu()
