"""``pyarith reproduce``."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, reported

if TYPE_CHECKING:
    from pyarith.reporting.experiments import Subject

_NAME = re.compile(r"E\d+|all", re.IGNORECASE)
_OUT = Path("runs/experiments")


def reproduce(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="E1 E2 ... | all [MODEL]",
            help="Experiments by name, or all; then a folder or hub name. [the shipped demo model]",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For the records, one JSON file each.")] = _OUT,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown page of all records in the folder. None: no page.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", metavar="N", min=2, help="Prompts per operator. [each experiment's own]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of prompts and draws. [0]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, to see that everything runs; the numbers mean nothing.")
    ] = False,
    also: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="E2: another model to compare; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="E9: questions (JSON lines or CSV). [stories made here]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), fp32, bf16, fp16 or fp64.")] = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """The paper's experiments, each on any supported model.

    A record per experiment, and a page of them. What is done already is not done again.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.reporting.experiments import EXPERIMENTS, Plan, draw_missing, read_all, render
        from pyarith.reporting.files import write_text

        start = time.perf_counter()
        names, model = _split(what)
        options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        others = tuple(_subject(terminal, name, out, (), options) for name in also or [])
        subject = _subject(terminal, model, out, others, options)
        plan = Plan.of(EXPERIMENTS, names, subject, out, quick=quick, force=force, data=data, n=n, seed=seed)
        for name, reason in plan.left_out.items():
            terminal.line(f"{name}  left out: {reason}")
        done = [name for name in plan.settings if name not in plan.todo]
        if done:
            terminal.line(f"Done already in {out}: {', '.join(done)}; --force does them again")
        running = plan.run(["pyarith", *sys.argv[1:]])
        for name in plan.todo:
            with terminal.step(f"{name}: {EXPERIMENTS[name].title}"):
                record = next(running)
            terminal.line(f"{name}  {EXPERIMENTS[name].short(record)}  ({record['seconds']:.0f} s)")
        if page is not None:
            records = read_all(out, list(EXPERIMENTS))
            draw_missing(EXPERIMENTS, records, out)
            page.parent.mkdir(parents=True, exist_ok=True)
            write_text(page, render(EXPERIMENTS, records, out, page))
            terminal.line(f"Wrote {page}: {count(len(records), 'experiment')}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _split(what: list[str]) -> tuple[list[str], str | None]:
    """Names of experiments, and the model if one is named."""
    from pyarith.errors import check

    names = [one if one.lower() != "all" else "all" for one in what if _NAME.fullmatch(one)]
    models = [one for one in what if not _NAME.fullmatch(one)]
    check(len(models) < 2, f"MODEL: expected one at most, got {', '.join(models)}; further models go to --also")
    check(bool(names), f"experiments: expected names such as E1 or all, got {', '.join(what)}")
    return [one.upper() if one != "all" else one for one in names], models[0] if models else None


def _subject(
    terminal: Terminal, name: str | None, out: Path, also: tuple[Subject, ...], options: dict[str, Any]
) -> Subject:
    """A loaded model; None is the demo model."""
    from pyarith.cli.loading import load
    from pyarith.cli.terminal import quiet_libraries
    from pyarith.demo import MODEL_DIR
    from pyarith.demo.train import command_of
    from pyarith.reporting.experiments import DEMO, Subject

    with terminal.step(f"Loading {name or DEMO}"):
        quiet_libraries()
        loaded = load(name or str(MODEL_DIR), note=terminal.note, **options)
    origin = command_of(Path(name)) if name else ""
    return Subject(loaded.model, loaded.tokenizer, name or DEMO, out, also, loaded.revision, origin)
