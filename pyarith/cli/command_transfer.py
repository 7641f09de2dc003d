"""``pyarith transfer``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, ModelNow, RunDir, Threshold, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, reported, table

if TYPE_CHECKING:
    from pyarith.evaluation import HeadList, TransferResult

_CONTROLS = {"same_layer": "random heads of the same layers", "random": "random heads"}


def transfer(
    run_dir: RunDir,
    top: Annotated[int, typer.Option(metavar="N", help="At most so many key heads per operator.", min=1)] = 5,
    heads: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A saved list of heads in place of the run's; may be repeated."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An operator or a task of pyarith; may be repeated. [all others]"),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="JSON lines, JSON, CSV or TSV with prompt and answer (or GSM8K-, SVAMP-, AddSub-like)."
        ),
    ] = None,
    baseline: Annotated[str, typer.Option(metavar="WHAT", help="mean (of the task's prompts), or zero.")] = "mean",
    draws: Annotated[int, typer.Option(metavar="N", help="Draws of each control.", min=1)] = 10,
    n: Annotated[int, typer.Option("--n", "-n", metavar="N", help="Items per task; of a file the first.", min=1)] = 100,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of items and draws. [the run's plus 1]")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Of an answer that is generated.", min=1)] = 32,
    threshold: Threshold = -0.05,
    model: ModelNow = None,
    device: Device = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes or 2GiB, beyond the model. [half of what is free]")
    ] = None,
    verify: Annotated[int, typer.Option(metavar="N", help="Sets per task to run again literally.", min=0)] = 2,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Do other tasks need the key heads of a run?

    Accuracy on other operators, other formats, tasks without arithmetic and files, with the heads ablated, beside as
    many random heads. After a kill the same command goes on where it was.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.runs import done_already, model_of, went_on, with_key_heads
        from pyarith.errors import check
        from pyarith.reporting import SavedRun, Step
        from pyarith.reporting.transfers import (
            BASELINES,
            content,
            default_tasks,
            draw,
            fitted,
            identity,
            key_lists,
            known_files,
            known_tasks,
            read_lists,
            write_step,
        )

        start = time.perf_counter()
        run = SavedRun.open(run_dir)
        check(baseline in BASELINES, f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
        number = int(run.record["seeds"].get("prompts", 0)) + 1 if seed is None else seed
        names, files = known_tasks(task or []), known_files(data or [])
        lists = read_lists(heads) if heads else {}
        ranked = {} if heads else {"top": top, "threshold": threshold}
        settings = {**ranked, "task": names, "n": n, "seed": number, "draws": draws, "baseline": baseline}
        settings |= {"max_new_tokens": max_new_tokens, **identity(heads or [], files)}
        step = Step(run, "transfer", settings)
        if step.finished and not force:
            done_already(terminal, step)
            return
        lists = lists or key_lists(run, list(with_key_heads(terminal, run, threshold)), top, threshold)
        loaded, tokenizer = model_of(terminal, run, model=model, device=device, trust_remote_code=trust_remote_code)
        for remark in fitted(lists, loaded):
            terminal.note(remark)
        seconds = {"loading": time.perf_counter() - start}
        with terminal.step("Drawing items"):
            asked = bool(names or files)
            chosen = names if asked else default_tasks(lists)
            drawn = draw(run, tokenizer, chosen, files, n, number, strict=asked)
        for name, why in drawn.left_out.items():
            terminal.line(f"{name}  left out: {why}")
        for name, words in drawn.words.items():
            terminal.line(f"{name}  {words}")
        from pyarith import evaluation
        from pyarith.plots import transfer_figure

        begun = time.perf_counter()
        went_on(terminal, step, force)
        with terminal.bar("Answering with heads ablated", sum(map(len, drawn.tasks.values()))) as progress:
            result = evaluation.transfer(
                loaded,
                tokenizer,
                drawn.tasks,
                {name: one.heads for name, one in lists.items()},
                baseline=baseline,
                draws=draws,
                seed=number,
                n=n,
                max_new_tokens=max_new_tokens,
                progress=progress,
                resume=step.parts,
                memory_budget=memory_budget,
                verify=verify,
            )
        seconds["transfer"] = time.perf_counter() - begun
        _say(terminal, result, lists)
        title = f"{Path(str(run.record['model']['name'])).name}: tasks with heads ablated ({_words(baseline)})"
        with step.alone():
            write_step(step, result, lists, loaded)
            step.add_figure("transfer.png", transfer_figure(result, title=title))
            written = step.finish(content(result, lists, drawn), seconds)
        for file in written:
            terminal.line(f"Wrote {file}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _words(baseline: str) -> str:
    return {"zero": "z := 0", "mean": "mean z"}[baseline]


def _say(terminal: Terminal, result: TransferResult, lists: dict[str, HeadList]) -> None:
    """The lists, and the matrix: two lines a task, the heads of each list and below them its controls."""
    from rich.markup import escape

    for name, one in lists.items():
        terminal.line(f"{name}  {count(len(one.heads), 'head')}: {' '.join(map(str, one.heads))}")
    terminal.line()
    terminal.line("Accuracy with these heads ablated, relative drop where the intact model is right", style="bold")
    controls = [name for name in _CONTROLS if name in result.cells[0].controls]
    terminal.line(f"Below: mean accuracy with {' / '.join(_CONTROLS[name] for name in controls)} ablated")
    made = table()
    made.add_column("task")
    for name in ("items", "intact", *result.head_lists):
        made.add_column(escape(name), justify="right", no_wrap=True)
    for task in result.tasks:
        cells = [result.cell(task, name) for name in result.head_lists]
        first = cells[0]
        drops = [f"{100 * one.accuracy:.1f} {_drop(one.relative_drop_correct)}" for one in cells]
        made.add_row(escape(task), str(first.n), f"{100 * first.accuracy_intact:.1f}", *drops)
        made.add_row("", "", "", *(" / ".join(_mean(one.controls[c].accuracy) for c in controls) for one in cells))
    terminal.out.print(made)
    if result.never_right:
        terminal.line(f"never right in the intact model, so nothing to knock out: {', '.join(result.never_right)}")
    terminal.line()


def _drop(value: float) -> str:
    text = "n/a" if value != value else f"{100 * value:+.0f}%" if abs(value) >= 0.005 else "0%"
    return f"{text:>5}"


def _mean(values: Any) -> str:
    return f"{100 * sum(values) / len(values):.1f}"
