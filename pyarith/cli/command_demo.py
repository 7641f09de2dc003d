"""``pyarith demo``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from pyarith.cli.options import Corruption, Debug, N, Seed, Top
from pyarith.cli.terminal import Terminal, reported

_OUT = Path("runs/demo")
_OPERATORS = ("+", "-", "*", "/")
_SHOWS = (
    "What this shows: how far the answer's logit moves, exactly, when one head or MLP gets its output at the last "
    "token from the corrupted prompt and all other heads keep theirs."
)
_SHOWS_NOT = (
    "What it does not show: that a large model works this way (this one is tiny, was trained on such prompts, and its "
    "first two layers were held back so that heads form later); that a head is needed (that takes a knock-out); heads "
    "that only move operands (try --corruption operands)."
)


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run directory; an earlier run in it is replaced.")] = _OUT,
    n: N = 200,
    seed: Seed = 0,
    corruption: Corruption = "operator",
    top: Top = 10,
    debug: Debug = False,
) -> None:
    """Arithmetic in the shipped model.

    The effects of all its heads and MLPs on four operators, a heat map and a run directory, in seconds.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.arithmetic import Prompts, explore, show, write
        from pyarith.cli.terminal import quiet_libraries
        from pyarith.reporting import RunDirectory

        start = time.perf_counter()
        run = RunDirectory(out)
        with terminal.step("Loading the demo model"):
            from pyarith.demo import load_demo

            quiet_libraries()
            model, tokenizer = load_demo()
        loaded = time.perf_counter() - start
        prompts = Prompts(_OPERATORS, corruption, n, seed)
        found = explore(terminal, model, tokenizer, prompts)
        found.seconds = {"loading": loaded, **found.seconds}
        size = sum(p.numel() for p in model.parameters())
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        terminal.line(f"The demo model: {size / 1e6:.1f} million parameters, {layers} layers of {heads} heads")
        show(terminal, found, top)
        settings = {"n": n, "seed": seed, "corruption": corruption, "operators": list(_OPERATORS)}
        files = write(
            run,
            found,
            model,
            command="demo",
            name="pyarith demo model",
            title=f"pyarith demo model, corruption: {corruption}",
            settings=settings,
            prompts=prompts,
        )
        terminal.line()
        terminal.text(_SHOWS)
        terminal.text(_SHOWS_NOT)
        terminal.line()
        for file in files:
            terminal.line(f"Wrote {file}")
        terminal.line(f"As a page: {shlex.join(['pyarith', 'report', str(out)])}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")
