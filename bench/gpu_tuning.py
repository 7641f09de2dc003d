"""Stage "tuning": Precise SFT at the LLaMA2-7B shape against the forward and backward pass of full fine-tuning.

Random bf16 weights made on the device, fp32 slices, 32 heads in layers 11-17 with their keys and values, batch 8 x 512
tokens, loss on all tokens. A step is forward, backward, update and clearing the gradients; full fine-tuning is charged
for forward and backward only. Both run on one copy of the weights.

The check is part of stage "engine" and comes first: gradients of a shortened model against full ones in fp32, and
updates against torch's AdamW. FLOP as in bench_tuning.py.

Memory is what a step holds at most beyond what a forward pass without gradients holds, slices and moments included.
Counted on tensors without data (tests/test_tuning_memory.py): 11.7 GiB, with gradient checkpointing 2.2 GiB. Forward
and backward of full fine-tuning hold 24.5 GiB beyond weights of 12.6 GiB, so that all of it fits 80 GB.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from gpu_engine import LLAMA2, Grouped, model_of, random_llama, rms, workload
from gpu_ops import COPY_SHARE, rounds, size
from gpu_work import Bench, Case, NotMeasured
from harness import Check, Row, Timing, relative_error
from transformers import LlamaForCausalLM

import pyarith

WORK = replace(LLAMA2, name="tuning llama2-7b", batch=8, pos=512)
N_HEADS = 32
CHECK = "check tuning"
UPDATES = 3
ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
FP32_BOUND = 1e-3  # largest difference of a gradient over the largest: sums over tokens in another order
SAME_DTYPE_BOUND = 0.05  # rms over rms, both in bf16; heads in the wrong place give 1.4
UPDATE_BOUND = 2e-6
STEP_SHARE = 0.62
EXTRA_GIB = {"": 12, " with gradient checkpointing": 4}
NEEDED_BYTES = 44 * 2**30
REPETITIONS = 5


def check_case() -> Case:
    return Case("engine", CHECK, check)


def cases() -> list[Case]:
    return [Case("tuning", WORK.name, measure, (CHECK,))]


def chosen_heads(work: Grouped) -> list[tuple[int, int]]:
    """32 heads in layers 11-17 of 32; in a smaller model as many layers as that share, and two heads in each."""
    first = work.n_layers * 11 // 32
    layers = max(2, work.n_layers * 7 // 32)
    count = N_HEADS if work.n_layers == LLAMA2.n_layers else 2 * layers
    apart = max(1, work.n_heads * 6 // 32)
    return [(first + i % layers, (i // layers * apart + i % layers) % work.n_heads) for i in range(count)]


def sized(bench: Bench) -> Grouped:
    return replace(workload(bench, WORK), n_layers=8, pos=24) if bench.tiny else WORK


@dataclass(frozen=True)
class Pair:
    """A tuner, and full fine-tuning on the same storage of the weights."""

    work: Grouped
    tuner: pyarith.SelectiveTuner
    full: LlamaForCausalLM
    ids: torch.Tensor

    @classmethod
    @contextmanager
    def of(cls, bench: Bench, work: Grouped, model: LlamaForCausalLM) -> "Iterator[Pair]":
        shared = {id(p): torch.nn.Parameter(p.data, requires_grad=True) for p in model.parameters()}
        full = copy.deepcopy(model, shared)
        ids = torch.randint(work.d_vocab, (work.batch, work.pos), generator=bench.generator("ids"), device=bench.device)
        with pyarith.SelectiveTuner(model, chosen_heads(work)) as tuner:
            yield cls(work, tuner, full, ids)

    def full_loss(self) -> torch.Tensor:
        found: torch.Tensor = self.full(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return found

    def full_backward(self) -> None:
        self.full_loss().backward()
        self.full.zero_grad()

    def full_gradients(self) -> torch.Tensor:
        """Those of the slices' entries, in the order of the slices, as one fp32 vector."""
        self.full_loss().backward()
        grads = {name: p.grad for name, p in self.full.named_parameters()}
        parts = [
            torch.cat([grads[one.name].narrow(one.dim, a, b - a) for a, b in one.ranges], one.dim)
            for one in self.tuner.slices
        ]
        self.full.zero_grad()
        return torch.cat([part.float().flatten() for part in parts])

    def loss(self) -> torch.Tensor:
        return self.tuner.loss(input_ids=self.ids, labels=self.ids)

    def gradients(self) -> torch.Tensor:
        self.loss().backward()
        found = torch.cat([value.grad.float().flatten() for value in self.tuner.parameters()])
        self.clear()
        return found

    def clear(self) -> None:
        for value in self.tuner.parameters():
            value.grad = None

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Activations between layers are kept, those inside are computed again."""
        model = self.tuner.model
        model.train()
        model.activation_checkpointing_enable()
        try:
            yield
        finally:
            model.activation_checkpointing_disable()
            model.eval()

    @property
    def flop(self) -> tuple[float, float]:
        """(a step of the tuner, forward and backward of full fine-tuning) without attention scores."""
        work = self.work
        tokens, above = work.batch * work.pos, 1 - self.tuner.first_layer / work.n_layers
        layers, head = work.batch * work.forward_flop, tokens * 2 * work.d_model * work.d_vocab
        return 2.0 * head + (1 + above) * layers, 3.0 * (layers + head)


def check(bench: Bench) -> None:
    """A model of four layers at full width: gradients in fp32 and bf16 against full ones in fp32, then updates."""
    work = replace(workload(bench, WORK), n_layers=4, batch=2, pos=size(bench, 128, 24))
    model = random_llama(work, bench)
    with Pair.of(bench, work, copy.deepcopy(model).float()) as exact:
        truth = exact.full_gradients()
        checked = Check("full gradients in fp32", relative_error(exact.gradients(), truth), FP32_BOUND)
        _write(bench, work, "fp32", checked.require("gradients of slices in fp32"))
    with Pair.of(bench, work, model) as pair:
        bound = 2 * rms(pair.full_gradients() - truth) / rms(truth) + torch.finfo(torch.bfloat16).eps
        found = {"bf16": pair.gradients()}
        with pair.checkpointing():
            found["bf16, gradient checkpointing"] = pair.gradients()
        for how, value in found.items():
            checked = Check("full gradients in fp32, rms", rms(value - truth) / rms(truth), bound)
            _write(bench, work, how, checked.require(f"gradients of slices in {how}"))
        _write(bench, work, "updates", check_updates(pair))


def check_updates(pair: Pair) -> Check:
    """``SliceAdamW`` against torch's AdamW on copies of the slices; the rest of the model keeps its bits."""
    tuner = pair.tuner
    values = list(tuner.parameters())
    copies = [torch.nn.Parameter(value.detach().clone()) for value in values]
    before = {name: p.detach().clone() for name, p in tuner.model.named_parameters() if "pyarith_slices" not in name}
    ours, theirs = tuner.optimizer(**ADAMW), torch.optim.AdamW(copies, **ADAMW)
    for _ in range(UPDATES):
        pair.loss().backward()
        for value, other in zip(values, copies, strict=True):
            other.grad = value.grad.clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    flat = [torch.cat([value.detach().flatten() for value in some]) for some in (values, copies)]
    for one, value in zip(tuner.slices, values, strict=True):
        at = 0
        for start, stop in one.ranges:
            part = value.detach().narrow(one.dim, at, stop - start)
            before[one.name].narrow(one.dim, start, stop - start).copy_(part)
            at += stop - start
    weights = dict(tuner.model.named_parameters())
    wrong = [name for name, expected in before.items() if not torch.equal(expected, weights[name])]
    if wrong:
        raise ValueError(f"updates: weights that are neither as before nor the rounded slices: {', '.join(wrong[:4])}")
    return Check("torch's AdamW", relative_error(*flat), UPDATE_BOUND).require("updates of slices")


def _write(bench: Bench, work: Grouped, how: str, checked: Check) -> None:
    dtype = "float32" if how == "fp32" else work.dtype
    bench.write(Row(CHECK, how, work.shape, dtype, checked))


def measure(bench: Bench) -> None:
    """Gradients at the full size, then time and memory of a step, and the update's share of the copy bandwidth."""
    work = sized(bench)
    model = model_of(bench, work)
    if not bench.tiny:
        free = torch.cuda.mem_get_info(bench.device)[0] + torch.cuda.memory_allocated(bench.device)
        if free < NEEDED_BYTES:
            raise NotMeasured(
                f"full fine-tuning takes {NEEDED_BYTES / 2**30:.0f} GiB, this device has {free / 2**30:.0f}"
            )
    with Pair.of(bench, work, model) as pair:
        expected = pair.full_gradients()
        error = rms(pair.gradients() - expected) / rms(expected)
        checked = Check("full gradients in bf16, rms", error, SAME_DTYPE_BOUND).require(work.name)
        del expected
        optimizer = pair.tuner.optimizer(lr=1e-6)

        def step() -> None:
            pair.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        count = 2 if bench.tiny else REPETITIONS
        timings = bench.clock.rounds({"step": step, "full": pair.full_backward}, count, warmup=1)
        time_step(bench, pair, timings, checked)
        memory(bench, pair, step, checked)
        update(bench, pair, optimizer)


def shape_of(pair: Pair) -> dict[str, object]:
    return {**pair.work.shape, "heads": len(pair.tuner.heads), "first_layer": pair.tuner.first_layer}


def time_step(bench: Bench, pair: Pair, timings: dict[str, Timing], checked: Check) -> None:
    own, full = timings["step"].median, timings["full"].median
    for name, provider, flop in zip(
        ("step", "full"), ("SelectiveTuner", "full forward and backward"), pair.flop, strict=True
    ):
        bench.write(
            Row(
                name=pair.work.name,
                provider=provider,
                shape=shape_of(pair),
                dtype=pair.work.dtype,
                check=checked,
                seconds=timings[name],
                flop=flop,
                extra={"over_full": timings[name].median / full, "flop_over_full": flop / pair.flop[1]},
            )
        )
    bound = pair.flop[0] / pair.flop[1]
    text = f"{own:.3f} s, full forward and backward {full:.3f} s: {own / full:.3f} (FLOP: {bound:.3f})"
    bench.figure("step of Precise SFT", text, f"<= {STEP_SHARE}", own / full <= STEP_SHARE)


def memory(bench: Bench, pair: Pair, step: Callable[[], None], checked: Check) -> None:
    """Peaks beyond those of inference; slices and moments are there all the time, gradients only inside a step."""
    sizes = pair.tuner.state_bytes
    held = sizes["slices"] + sizes["adamw"]

    def inference() -> None:
        with torch.no_grad():
            pair.tuner.model(input_ids=pair.ids, use_cache=False)

    inferred = bench.clock.peak_bytes(inference)
    for how, most in EXTRA_GIB.items():
        if how:
            with pair.checkpointing():
                step()  # what a first call keeps for later ones is no part of a step
                peak = bench.clock.peak_bytes(step)
        else:
            peak = bench.clock.peak_bytes(step)
        extra = held + peak - inferred
        bench.write(
            Row(
                name=f"{pair.work.name}, memory",
                provider=f"SelectiveTuner{how}",
                shape=shape_of(pair),
                dtype=pair.work.dtype,
                check=checked,
                peak_private_bytes=extra,
                extra={"held_bytes": held, "step_bytes": peak, "inference_bytes": inferred},
            )
        )
        bench.figure(f"  memory{how}", f"{extra / 2**30:.2f} GiB", f"<= {most} GiB", extra <= most * 2**30)


def update(bench: Bench, pair: Pair, optimizer: torch.optim.Optimizer) -> None:
    """``masked_adamw`` on all slices as the optimizer calls it, host work included where the device waits for it."""
    checked = check_updates(pair)
    pair.loss().backward()
    timing = bench.clock.rounds({"update": optimizer.step}, rounds(bench))["update"]
    pair.clear()
    moved = pair.tuner.n_parameters * (28.0 + getattr(torch, pair.work.dtype).itemsize)
    bandwidth = bench.value("copy", "per_s")
    share = None if bandwidth is None else moved / bandwidth / timing.median
    bench.write(
        Row(
            name=f"{pair.work.name}, update",
            provider="masked_adamw",
            shape=shape_of(pair),
            dtype=pair.work.dtype,
            check=checked,
            seconds=timing,
            bytes=moved,
            share_of_roofline=share,
        )
    )
    text = f"{timing.median * 1e3:.3f} ms, {moved / timing.median / 1e12:.2f} TB/s"
    text += "" if share is None else f", {share:.1%} of copy"
    bench.figure("  update", text, f">= {COPY_SHARE:.0%} of copy", None if share is None else share >= COPY_SHARE)
