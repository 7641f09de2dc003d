"""``pyarith knockout``."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, ModelNow, RunDir, Threshold, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, reported, table

if TYPE_CHECKING:
    from pyarith.discovery.knockout import KnockoutCurve
    from pyarith.reporting import SavedRun

_KS = (1, 2, 3, 5, 10)
_ARMS = {"key": "key heads", "random": "random", "same_layer": "same layer", "bottom": "bottom", "kept": "only top k"}


def knockout(
    run_dir: RunDir,
    k: Annotated[
        str | None, typer.Option("--k", metavar="K,K,...", help="Numbers of heads, rising. [1,2,3,5,10]")
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="WHAT", help="mean, zero, resample or mean-per-position (of equally long prompts).")
    ] = "mean",
    draws: Annotated[int, typer.Option(metavar="N", help="Draws of each random control.")] = 10,
    n: Annotated[int | None, typer.Option("--n", "-n", metavar="N", help="Fresh prompts. [as in the run]")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of prompts and draws. [the run's plus 1]")] = None,
    prompts: Annotated[
        str, typer.Option(metavar="WHICH", help="fresh, or report: half of the run's, heads ranked on the other half.")
    ] = "fresh",
    threshold: Threshold = -0.05,
    model: ModelNow = None,
    device: Device = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes or 2GiB, beyond the model. [half of what is free]")
    ] = None,
    verify: Annotated[int, typer.Option(metavar="N", help="Sets to run again literally.", min=0)] = 2,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """What is left when the top heads of a run are ablated.

    Accuracy on prompts that the run does not have, beside random heads, random heads of the same layers and the heads
    at the other end of the ranking. After a kill the same command goes on where it was.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.arithmetic import name_of
        from pyarith.cli.runs import done_already, model_of, went_on, with_key_heads
        from pyarith.errors import check
        from pyarith.reporting import SavedRun, Step
        from pyarith.reporting.knockouts import BASELINES, PROMPTS

        start = time.perf_counter()
        run = SavedRun.open(run_dir)
        ks = _numbers(k, run)
        check(baseline in BASELINES, f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
        check(prompts in PROMPTS, f"prompts: expected one of {', '.join(PROMPTS)}, got {prompts!r}")
        check(draws >= 1, f"draws: expected a whole number >= 1, got {draws}")
        number = int(run.record["seeds"].get("prompts", 0)) + 1 if seed is None else seed
        settings = {"k": ks, "baseline": baseline, "draws": draws, "n": n, "seed": number, "prompts": prompts}
        step = Step(run, "knockout", {**settings, "threshold": threshold})
        if step.finished and not force:
            done_already(terminal, step)
            return
        signs = list(with_key_heads(terminal, run, threshold))
        loaded, tokenizer = model_of(terminal, run, model=model, device=device, trust_remote_code=trust_remote_code)
        seconds = {"loading": time.perf_counter() - start}
        options = {"ks": ks, "draws": draws, "seed": number, "memory_budget": memory_budget, "verify": verify}
        content, rows, curves = {}, [], {}
        from pyarith.reporting.knockouts import choose, curve, curve_record, curve_rows

        went_on(terminal, step, force)
        for sign in signs:
            begun = time.perf_counter()
            chosen = choose(run, tokenizer, sign, prompts, n, number)
            with terminal.bar(f"Knocking out: {sign}", len(chosen.pairs)) as progress:
                found, alone = curve(loaded, chosen, baseline, progress=progress, resume=step.parts, **options)
            curves[sign] = found
            content[sign] = curve_record(found, chosen, alone)
            rows += curve_rows(sign, found)
            seconds[f"knockout {sign}"] = time.perf_counter() - begun
            terminal.line(f"{sign}  {chosen.words}")
            _say(terminal, sign, found, alone)
        from pyarith.plots import knockout_figure
        from pyarith.reporting.tables import write_csv

        title = f"{Path(str(run.record['model']['name'])).name}: knock-out, {_words(baseline)}"
        with step.alone():
            write_csv(step.file("knockout.csv"), rows)
            step.add_figure("knockout.png", knockout_figure({name_of(s): c for s, c in curves.items()}, title=title))
            files = step.finish({"curves": content}, seconds)
        for file in files:
            terminal.line(f"Wrote {file}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _words(baseline: str) -> str:
    return {"zero": "z := 0", "resample": "z of another prompt", "mean": "mean z"}.get(baseline, "mean z per position")


def _numbers(text: str | None, run: SavedRun) -> list[int]:
    """The numbers of heads, checked against the model's before anything is loaded."""
    from pyarith.errors import InputError, check

    most = min(run.effects(sign).size for sign in run.signs)
    if text is None:
        return [one for one in _KS if one <= most]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"k: expected whole numbers such as 1,2,5, got {text!r}") from None
    rising = all(a < b for a, b in pairwise(numbers)) and numbers[0] >= 1
    check(rising, f"k: expected rising whole numbers >= 1, got {text!r}")
    check(numbers[-1] <= most, f"k: expected at most the {most} heads of the model, got {numbers[-1]}")
    return numbers


def _say(terminal: Terminal, sign: str, found: KnockoutCurve, alone: int) -> None:
    """The table of one operator."""
    left = [f"{count(found.n_wrong, 'prompt')} answered wrongly left out"] if found.n_wrong else []
    left += [f"{count(alone, 'prompt')} without another of equal length left out"] if alone else []
    terminal.line(
        f"{sign}  accuracy in percent on {count(found.n_prompts, 'prompt')}{''.join(f'; {words}' for words in left)}"
    )
    made = table()
    made.add_column("k", justify="right")
    made.add_column("key heads", justify="right")
    made.add_column("drop", justify="right")
    others = [name for name in ("random", "same_layer", "bottom", "kept") if name in found.arms]
    for name in others:
        made.add_column(_ARMS[name], justify="right", no_wrap=True)
    drop = found.relative_drop()
    for i, number in enumerate(found.ks):
        cells = [_share(found.arms[name].accuracy[:, i]) for name in others]
        key = _share(found.arms["key"].accuracy[:, i])
        made.add_row(str(number), key, f"{100 * drop[i]:+.1f}%", *cells)
    terminal.out.print(made)
    terminal.line(f"all heads ablated: {100 * found.all_ablated[0]:.1f}%")
    terminal.line()


def _share(values: Any) -> str:
    """Mean in percent, with the least and the most over draws where there are several."""
    mean = f"{100 * values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * values.min():.0f}..{100 * values.max():.0f})"
