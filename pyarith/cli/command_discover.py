"""``pyarith discover``."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from pyarith.cli.options import Corruption, Debug, Force, N, Seed, Top
from pyarith.cli.terminal import Terminal, reported

_NOT_SETTINGS = ("out", "debug", "force", "operator", "style")


def discover(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or a Hugging Face hub name.")],
    operator: Annotated[
        list[str] | None, typer.Option(metavar="SIGN", help="+ - * / or add sub mul div; may be repeated. [+]")
    ] = None,
    corruption: Corruption = "operator",
    n: N = 200,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory; an earlier run in it is replaced. None: only print."),
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option(metavar="STYLE", help="equation, statement or question; may be repeated. [all]"),
    ] = None,
    only_correct: Annotated[
        bool, typer.Option("--only-correct", help="Leave out prompts that the model answers wrongly.")
    ] = False,
    mlps: Annotated[str, typer.Option(metavar="HOW", help="recomputed, or frozen (another quantity).")] = "recomputed",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), fp32, bf16, fp16 or fp64.")] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Seed = 0,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub model.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes or 2GiB, beyond the model. [half of what is free]")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, or one of what `pyarith doctor` lists.")] = "auto",
    verify: Annotated[int, typer.Option(metavar="N", help="Senders to run again literally.", min=0)] = 2,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave the weights in their files: for models larger than memory.")
    ] = False,
    top: Top = 10,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Race the heads for the K most negative; spends prompts on the undecided."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(metavar="LEVEL", help="With --top-k: that all its decisions are right.")
    ] = 0.95,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="LOGITS", help="With --top-k: heads no further apart are ties. [the noise floor]"),
    ] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Arithmetic in any supported model.

    The effects of all its heads and MLPs on its answers, from a local checkpoint or a hub name. After a kill the same
    command with --out goes on where it was. Under torchrun several processes share the prompts.
    """
    operators, styles = operator or ["+"], style or []
    settings = {key: value for key, value in locals().items() if key not in _NOT_SETTINGS}
    terminal = Terminal()
    with reported(debug), ExitStack() as stack:
        from pyarith.cli.arithmetic import Prompts, explore, show, write
        from pyarith.cli.job import job
        from pyarith.cli.loading import load
        from pyarith.cli.runs import went_on
        from pyarith.cli.terminal import quiet_libraries
        from pyarith.reporting import RunDirectory

        start = time.perf_counter()
        ranks, place = stack.enter_context(job(terminal, device))
        run = None if out is None else RunDirectory(out)
        with terminal.step(f"Loading {model}"):
            quiet_libraries()
            loaded = load(
                model,
                dtype=dtype,
                device=place,
                revision=revision,
                trust_remote_code=trust_remote_code,
                stream=stream,
                note=terminal.note,
            )
        seconds = time.perf_counter() - start
        done = ranks.tell(lambda: run is not None and not force and run.done("discover", loaded.model, settings))
        if done:
            terminal.line(f"Done already: {out} holds this run; --force does it again")
            return
        if run is not None and ranks.rank == 0:
            went_on(terminal, run, force)
        ranks.meet()
        prompts = Prompts(operators, corruption, n, seed, styles, only_correct)
        options: dict[str, Any] = {"mlps": mlps, "memory_budget": memory_budget, "backend": backend, "verify": verify}
        options |= {"top_k": top_k, "confidence": confidence, "tolerance": tolerance, "seed": seed}
        options |= {"resume": None if run is None else run.parts}
        # what is written and printed is rank 0's business
        found = explore(terminal, loaded.model, loaded.tokenizer, prompts, judged=ranks.rank == 0, **options)
        if ranks.rank:
            return
        found.seconds = {"loading": seconds, **found.seconds}
        facts = next(iter(found.discoveries.values())).result.settings
        terminal.line(f"{model} in {facts['dtype']} on {facts['device']}, corruption: {corruption}")
        show(terminal, found, top)
        terminal.line()
        if run is not None:
            files = write(
                run,
                found,
                loaded.model,
                command="discover",
                name=model,
                title=f"{Path(model).name}, corruption: {corruption}",
                settings=settings,
                prompts=prompts,
                revision=loaded.revision,
            )
            for file in files:
                terminal.line(f"Wrote {file}")
            terminal.line(f"As a page: {shlex.join(['pyarith', 'report', str(out)])}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")
