"""``pyarith compare``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, ModelNow, RunDir, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, reported, table

if TYPE_CHECKING:
    from pyarith.tuning.compare import ArmSummary


def compare(
    run_dir: RunDir,
    operator: Annotated[str, typer.Option(metavar="SIGN", help="What is trained; one of the run's operators.")],
    heads: Annotated[int, typer.Option(metavar="K", help="Heads of each arm of heads.", min=1)] = 4,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="key heads, same layers, random heads, bottom heads, random mask, LoRA, "
            "early LoRA or full; may be repeated. [all]",
        ),
    ] = None,
    rates: Annotated[str, typer.Option(metavar="X,X,...", help="Learning rates of every arm. [a sweep each]")] = "",
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each arm and rate.", min=1)] = 3,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task that should stay; may be repeated. [the others]")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", metavar="N", help="Prompts to divide.", min=8)] = 1200,
    items: Annotated[int, typer.Option(metavar="N", help="Prompts of each task that should stay.", min=1)] = 60,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the training prompts.", min=1)] = 2,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Examples of an optimizer step.", min=1)] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the prompts and their division.")] = 0,
    model: ModelNow = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Training the run's top heads beside other ways of training: gain on one operator against loss on other tasks.

    Every arm has its own sweep of learning rates, chosen on prompts that are not reported, and the same data order. A
    killed comparison goes on with the runs that it has not done.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.runs import done_already, model_of
        from pyarith.errors import check
        from pyarith.plots import frontier_figure
        from pyarith.reporting import SavedRun, Step
        from pyarith.reporting import comparisons as made
        from pyarith.reporting.tables import write_csv
        from pyarith.tuning.compare import compare as run_all
        from pyarith.tuning.settings import TuneSettings

        start = time.perf_counter()
        run = SavedRun.open(run_dir)
        check(operator in run.signs, f"operator: expected one of {', '.join(run.signs)}, got {operator!r}")
        names = list(arm or made.ARMS)
        by_arm = {name: _rates(rates) if rates else made.RATES.get(name, ()) for name in names}
        own = {"operator": operator, "heads": heads, "arms": names, "rates": by_arm, "seeds": seeds, "keep": keep}
        own |= {"n": n, "items": items, "epochs": epochs, "batch_size": batch_size, "seed": seed}
        step = Step(run, "compare", own)
        if step.finished and not force:
            done_already(terminal, step)
            return
        ranking = run.ranking(operator)
        loaded, tokenizer = model_of(terminal, run, model=model, device=device, trust_remote_code=trust_remote_code)
        retention = keep or made.usual_retention(tokenizer, operator)
        with terminal.step("Dividing prompts"):
            split = made.split_task(tokenizer, operator, n=n, seed=seed, retention=retention, items=items)
            arms, size = made.usual_arms(loaded, ranking, heads, names)
        sizes = ", ".join(f"{name} {amount}" for name, amount in split.sizes.items())
        terminal.line(f"{count(len(names), 'arm')} of {size:,} parameters each (full: all); prompts: {sizes}")
        kept = made.Kept(run.path / ".compare.points", step.key)
        if force:
            kept.path.unlink(missing_ok=True)
        total = sum(map(len, by_arm.values())) * seeds
        with terminal.bar("Training", total) as bar:
            found = run_all(
                loaded,
                split.examples(tokenizer),
                arms,
                split.score(),
                target=made.TARGET,
                validation=made.VALIDATION,
                retention=retention,
                clusters=split.tests[made.TARGET],
                rates=by_arm,
                seeds=range(seeds),
                settings=TuneSettings(epochs=epochs, batch_size=batch_size, micro_batch_size=batch_size),
                done=kept.points(),
                keep=kept.keep,
                progress=bar if callable(bar) else None,
            )
        summary = found.summary()
        _say(terminal, found.base, summary)
        record = made.comparison_record(found, summary, split)
        best = {one.arm: one.rate for one in summary}
        title = f"{Path(str(run.record['model']['name'])).name}: training {operator}"
        with step.alone():
            write_csv(step.file("runs.csv"), record["frontier"])
            step.add_figure("frontier.png", frontier_figure(record["frontier"], best, title))
            files = step.finish({"comparison": record}, {"all": time.perf_counter() - start})
        for file in files:
            terminal.line(f"Wrote {file}")
        kept.path.unlink(missing_ok=True)
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _rates(text: str) -> tuple[float, ...]:
    from pyarith.errors import InputError

    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) <= 0:
        raise InputError(f"rates: expected positive numbers such as 1e-3,3e-3, got {text!r}")
    return found


def _say(terminal: Terminal, base: dict[str, Any], summary: list[ArmSummary]) -> None:
    """One line an arm, at its best rate."""
    made = table()
    for name in ("arm", "rate", "parameters", "target", "gain", "others", "target, against first", "q"):
        made.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name != "arm")
    made.add_row("untrained", "", "", f"{100 * base['target'].mean():.1f}", "", "", "", "")
    for one in summary:
        first = one.low != one.low
        against = "" if first else f"{100 * one.difference:+.1f} ({100 * one.low:+.1f} {100 * one.high:+.1f})"
        cells = [f"{one.rate:g}{'*' if one.at_edge else ''}", f"{one.n_parameters:,}", f"{100 * one.target:.1f}"]
        cells += [f"{100 * one.target_change:+.1f}", f"{100 * one.retention_change:+.1f}", against]
        made.add_row(one.arm, *cells, "" if first else f"{one.q:.2g}")
    terminal.out.print(made)
    terminal.line(
        f"Accuracies and changes in percent; target against {summary[0].arm}, with a 95 % interval; *: the best rate "
        "is at the edge of the sweep, and the arm may do better beyond it"
    )
