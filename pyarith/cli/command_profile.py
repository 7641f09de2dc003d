"""``pyarith profile``."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, reported, table

if TYPE_CHECKING:
    from pyarith.discovery.profile import PatchProfile
    from pyarith.engine.sizing import JobShape, JobSize

_SHAPE = {"prompts": 100, "tokens": 16, "prefix": 0}
_HELD = 6  # lines of what held memory


@dataclass(frozen=True)
class _Asked:
    """What the options ask for, checked."""

    model: str
    random: bool
    dtype: str
    device: str
    revision: str | None
    memory_budget: str | None
    backend: str
    verify: int
    trust_remote_code: bool
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """For ``profile_patch``."""
        return {"memory_budget": self.memory_budget, "backend": self.backend, "verify": self.verify}


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint, a hub name, or a RUN_DIR. With --random its config.json is enough."
        ),
    ],
    shape: Annotated[
        str | None,
        typer.Option(metavar="prompts=N,...", help="prompts, tokens, prefix. [prompts=100,tokens=16,prefix=0]"),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights: only the config is read.")] = False,
    forecast_only: Annotated[
        bool, typer.Option("--forecast-only", help="Compute the cost from the config; run nothing.")
    ] = False,
    rate: Annotated[
        str | None, typer.Option(metavar="FLOP/S", help="With --forecast-only, such as 780T. [measured here]")
    ] = None,
    operator: Annotated[
        str | None, typer.Option(metavar="SIGN", help="Of a RUN_DIR: whose prompts. [the first]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), fp32, bf16, fp16 or fp64.")] = "auto",
    device: Device = "auto",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub model.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes or 2GiB, beyond the model. [half of what is free]")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, or one of what `pyarith doctor` lists.")] = "auto",
    verify: Annotated[int, typer.Option(metavar="N", help="Senders to run again literally.", min=0)] = 0,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Chrome trace of a further run, by torch.profiler.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Everything as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    top: Annotated[int, typer.Option(metavar="N", help="Ops to print.", min=1)] = 10,
    seed: Annotated[int, typer.Option(metavar="N", help="Of random weights and prompts.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Where the time and memory of path patching go, or what a job would cost.

    Runs it on prompts of a shape, counts every op, and holds it against the forecast and what this machine can do. Of a
    RUN_DIR it takes the run's own model and prompts, and the report shows what came out.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.errors import check
        from pyarith.reporting.saved import RECORD

        asked = _Asked(model, random, dtype, device, revision, memory_budget, backend, verify, trust_remote_code, seed)
        of_run = (Path(model) / RECORD).is_file()
        check(not of_run or shape is None, f"shape: expected none with the RUN_DIR {model}, whose prompts are taken")
        check(of_run or operator is None, f"operator: expected a RUN_DIR with it, got the model {model}")
        check(rate is None or forecast_only, "rate: expected --forecast-only with it; a run measures its own")
        check(not (forecast_only and trace), "trace: expected a run to trace, got --forecast-only")
        check(not (of_run and (random or forecast_only)), f"MODEL: {model} is a RUN_DIR; give its model instead")
        start = time.perf_counter()
        if of_run:
            record = _of_run(terminal, asked, operator, trace, force, None if as_json else top)
        elif forecast_only:
            size, kind = _size(terminal, asked, _shape(shape), rate)
            record = {"model": model, "shape": vars(_shape(shape)), "dtype": kind, **size.record()}
            if not as_json:
                _say_size(terminal, size, kind)
        else:
            found = _of_shape(terminal, asked, _shape(shape), trace)
            record = found.record()
            if not as_json:
                _say(terminal, found, top)
        if record is None:
            return
        text = json.dumps(record, indent=1, default=str)
        if out is not None:
            out.write_text(text + "\n", encoding="utf-8")
        if as_json:
            print(text)
            return
        for file in filter(None, (trace, out)):
            terminal.line(f"Wrote {file}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _shape(text: str | None) -> JobShape:
    """``prompts=100,tokens=16``; what is not named has its default.

    Raises:
        InputError: an unknown name, no whole number, or prompts that cannot be.
    """
    from pyarith.engine.sizing import JobShape
    from pyarith.errors import InputError

    sizes = dict(_SHAPE)
    for part in text.split(",") if text else ():
        name, _, value = part.strip().partition("=")
        if name not in sizes or not value.strip().isdecimal():
            raise InputError(f"shape: expected prompts=N,tokens=N,prefix=N or some of these, got {part!r} in {text!r}")
        sizes[name] = int(value)
    return JobShape(**sizes)


def _config(terminal: Terminal, asked: _Asked) -> tuple[Any, Any]:
    """The config and the dtype of the weights, as the config says or as asked."""
    import torch

    from pyarith.cli.loading import DTYPES, load_config
    from pyarith.cli.terminal import quiet_libraries
    from pyarith.errors import check

    known = ", ".join(["auto", *DTYPES])
    check(asked.dtype == "auto" or asked.dtype in DTYPES, f"dtype: expected one of {known}, got {asked.dtype!r}")
    quiet_libraries()
    config = load_config(
        asked.model, revision=asked.revision, trust_remote_code=asked.trust_remote_code, note=terminal.note
    )
    stored = getattr(config, "dtype", None) or torch.float32
    return config, stored if asked.dtype == "auto" else getattr(torch, DTYPES[asked.dtype])


def _size(terminal: Terminal, asked: _Asked, shape: JobShape, rate: str | None) -> tuple[JobSize, str]:
    from pyarith.cli.loading import find_device
    from pyarith.engine.planner import default_budget, gemm_rate, parse_bytes
    from pyarith.engine.sizing import parse_rate, size_of_job

    config, dtype = _config(terminal, asked)
    place = find_device(asked.device)
    budget = parse_bytes(asked.memory_budget)
    size = size_of_job(
        config,
        shape,
        dtype,
        rate=gemm_rate(place, dtype) if rate is None else parse_rate(rate),
        memory_budget=default_budget(place) if budget is None else budget,
        device=place.type,
    )
    return size, str(dtype).removeprefix("torch.")


def _of_shape(terminal: Terminal, asked: _Asked, shape: JobShape, trace: Path | None) -> PatchProfile:
    """Profile a model on random prompts."""
    from pyarith.cli.loading import find_device, load
    from pyarith.cli.terminal import quiet_libraries
    from pyarith.discovery.profile import profile_patch
    from pyarith.errors import InputError

    if asked.random:
        from pyarith.engine.sizing import expect_room
        from pyarith.models.random_weights import random_model

        config, dtype = _config(terminal, asked)
        place = find_device(asked.device)
        expect_room(config, dtype, place)
        with terminal.step("Making random weights"):
            model: Any = random_model(config, dtype, place, asked.seed)
    else:
        if Path(asked.model).is_file():
            raise InputError(
                f"MODEL: expected a folder or a hub name, got the file {asked.model!r}; --random makes weights for it, "
                "--forecast-only needs none"
            )
        with terminal.step(f"Loading {asked.model}"):
            quiet_libraries()
            model = load(
                asked.model,
                dtype=asked.dtype,
                device=asked.device,
                revision=asked.revision,
                trust_remote_code=asked.trust_remote_code,
                note=terminal.note,
            ).model
    inputs = shape.inputs(model.config.get_text_config().vocab_size, asked.seed)
    with terminal.step("Running, first with every op counted"):
        return profile_patch(model, **inputs, trace=trace, **asked.options)


def _of_run(
    terminal: Terminal, asked: _Asked, operator: str | None, trace: Path | None, force: bool, top: int | None
) -> dict[str, Any] | None:
    """Profile a run's own model on its own prompts, as a step of the run; None where that is done already."""
    from pyarith.cli.runs import done_already, model_of
    from pyarith.discovery.profile import profile_patch
    from pyarith.errors import check
    from pyarith.reporting import SavedRun, Step
    from pyarith.reporting.profiles import write_step

    run = SavedRun.open(asked.model)
    sign = run.signs[0] if operator is None else operator
    check(sign in run.signs, f"operator: expected one of the run's ({', '.join(run.signs)}), got {operator!r}")
    step = Step(run, "profile", {"operator": sign, **asked.options})
    if step.finished and not force and trace is None:
        done_already(terminal, step)
        return None
    model, tokenizer = model_of(terminal, run, device=asked.device, trust_remote_code=asked.trust_remote_code)
    with terminal.step("Running, first with every op counted"):
        found = profile_patch(model, run.pairs(tokenizer, sign), trace=trace, **asked.options)
    if top is not None:
        _say(terminal, found, top)
    with step.alone():
        files = step.finish(write_step(step, found), found.seconds)
    if top is not None:
        for file in files:
            terminal.line(f"Wrote {file}")
    return found.record()


def _say(terminal: Terminal, found: PatchProfile, top: int) -> None:
    """Phases, ops, memory, and the forecast."""
    from rich.markup import escape

    from pyarith.reporting.profiles import amount, duration

    rates, facts = found.roofline, found.result.settings
    terminal.line(
        f"{facts['model']}: {facts['n_layers']} layers x {facts['n_heads']} heads in {facts['dtype']} on "
        f"{facts['device']}, {count(len(found.result.clean_logits), 'prompt')}: {duration(found.seconds['timed'])}"
    )
    terminal.line(
        f"Measured here: products {amount(rates.flop_per_second, 'FLOP')}/s, copies {amount(rates.bytes_per_second)}/s"
    )
    for title, costs, names in (
        ("By phase", found.phases, ["phase"]),
        (f"By op, the longest {top} (timed while all ops are counted)", found.ops[:top], ["phase", "op", "calls"]),
    ):
        terminal.line()
        terminal.line(title, style="bold")
        made = table()
        for name in names:
            made.add_column(name)
        for name in ("time", "work", "moved", "roofline"):
            made.add_column(name, justify="right", no_wrap=True)
        for cost in costs:
            words = [cost.phase, cost.op.removeprefix("aten::"), str(cost.calls)][: len(names)]
            figures = duration(cost.seconds), amount(cost.flop, "FLOP"), amount(cost.bytes), f"{cost.roofline:.0%}"
            made.add_row(*map(escape, words), *figures)
        terminal.out.print(made)
    memory = found.high_water
    terminal.line()
    terminal.line(f"Most memory beyond the model: {amount(memory.bytes)}, in {memory.phase}", style="bold")
    held = sorted(memory.held.items(), key=lambda pair: -pair[1])
    for name, size in held[:_HELD]:
        terminal.line(f"{amount(size):>9}  {name}")
    if len(held) > _HELD:
        terminal.line(f"{amount(sum(size for _, size in held[_HELD:])):>9}  {count(len(held) - _HELD, 'other')}")
    if found.allocator_bytes is not None:
        terminal.line(f"{amount(found.allocator_bytes):>9}  by CUDA's allocator")
    terminal.line()
    terminal.line("Forecast, and what was found", style="bold")
    for name, (forecast, real) in found.compared.items():
        said = [
            duration(v) if name == "seconds" else amount(v, "FLOP" if "FLOP" in name else "B") for v in (forecast, real)
        ]
        terminal.line(f"{name:24}{said[0]:>12}{said[1]:>12}")
    if not found.unchanged:
        terminal.line("The run in which ops were counted gave other bits than the timed one", style="bold red")
    terminal.line()


def _say_size(terminal: Terminal, size: JobSize, dtype: str) -> None:
    from pyarith.reporting.profiles import amount, duration

    cost, plan = size.forecast, size.plan
    lines = {
        "parameters": f"{size.parameters / 1e9:.3g} billion",
        "weights": f"{amount(size.weight_bytes)} in {dtype}",
        "memory beyond them": f"{amount(cost.bytes)}, in blocks of {count(plan.prompts, 'prompt')}: the weights are "
        f"read {count(size.sweeps, 'time')}",
        "  without a budget": f"{amount(size.one_sweep_bytes)}, in blocks of {count(size.one_sweep.prompts, 'prompt')}",
        "work": f"{amount(size.flop, 'FLOP')}: captures {amount(cost.capture_flop, 'FLOP')}, rows "
        f"{amount(cost.replay_flop, 'FLOP')}",
        "one forward per sender": f"{amount(size.literal_flop, 'FLOP')}, {size.literal_flop / size.flop:.0f} times",
        "time": f"{duration(cost.seconds)} at {amount(cost.gemm_flop_per_second, 'FLOP')}/s",
    }
    terminal.line("Computed, not measured", style="bold")
    for name, text in lines.items():
        terminal.line(f"{name:24}{text}")
