"""``pyarith discover``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from pyarith.cli.terminal import Terminal, reported


def discover(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or a Hugging Face hub name.")],
    operator: Annotated[
        list[str], typer.Option(metavar="SIGN", help="+ - * / or add sub mul div; may be repeated.")
    ] = ["+"],  # noqa: B006
    corruption: Annotated[
        str, typer.Option(metavar="KIND", help="operator, operand_a, operand_b or operands.")
    ] = "operator",
    n: Annotated[int, typer.Option("--n", "-n", metavar="N", help="Prompts per operator.")] = 200,
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time, also on Python 3.10
        typer.Option(
            metavar="DIR", help="Run directory to write; an earlier run in it is replaced. Without it only printed."
        ),
    ] = None,
    style: Annotated[
        list[str], typer.Option(metavar="STYLE", help="equation, statement or question; may be repeated.")
    ] = [],  # noqa: B006
    only_correct: Annotated[
        bool, typer.Option("--only-correct", help="Leave out prompts that the model answers wrongly.")
    ] = False,
    mlps: Annotated[str, typer.Option(metavar="HOW", help="recomputed, or frozen (another quantity).")] = "recomputed",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), fp32, bf16, fp16 or fp64.")] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    revision: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="Branch, tag or commit of a hub model.")
    ] = None,  # noqa: UP045
    memory_budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="Bytes or 2GiB, beyond the model; default half of what is free."),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, or one of what `pyarith doctor` lists.")] = "auto",
    verify: Annotated[int, typer.Option(metavar="N", help="Senders to run again literally.", min=0)] = 2,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    top: Annotated[int, typer.Option(metavar="N", help="Heads to print.", min=1)] = 10,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Arithmetic in any supported model.

    The effects of all its heads and MLPs on its answers, from a local checkpoint or a hub name.
    """
    settings = {key: value for key, value in locals().items() if key not in ("out", "debug")}
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.arithmetic import Prompts, explore, show, write
        from pyarith.cli.loading import load
        from pyarith.cli.terminal import quiet_libraries
        from pyarith.reporting import RunDirectory

        start = time.perf_counter()
        run = None if out is None else RunDirectory(out)
        with terminal.step(f"Loading {model}"):
            quiet_libraries()
            loaded = load(
                model,
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
                note=terminal.note,
            )
        seconds = time.perf_counter() - start
        prompts = Prompts(operator, corruption, n, seed, style, only_correct)
        options = {"mlps": mlps, "memory_budget": memory_budget, "backend": backend, "verify": verify}
        found = explore(terminal, loaded.model, loaded.tokenizer, prompts, **options)
        found.seconds = {"loading": seconds, **found.seconds}
        precision, place = str(loaded.model.dtype).removeprefix("torch."), loaded.model.device
        terminal.line(f"{model} in {precision} on {place}, corruption: {corruption}")
        show(terminal, found.discoveries, top)
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
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")
