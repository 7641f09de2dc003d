"""What the commands print: results to stdout; progress, notes and errors to stderr; plain where it is a pipe."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from pyarith.errors import PyarithError

ERROR = 2  # exit code of every error that is the caller's to mend


class Terminal:
    """Consoles for stdout and stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self.out = Console(file=sys.stdout, highlight=False, emoji=False)
        self.err = Console(file=sys.stderr, highlight=False, emoji=False, stderr=True)

    def mute(self) -> None:
        """Say nothing from here on."""
        self.out.quiet = self.err.quiet = True

    def line(self, text: str = "", style: str | None = None) -> None:
        """A line of results; never broken, brackets mean nothing."""
        self.out.print(text, style=style, markup=False, soft_wrap=True)

    def text(self, text: str) -> None:
        """A paragraph of results, broken to the width of the terminal."""
        self.out.print(text, markup=False)

    def note(self, text: str) -> None:
        """A line beside the results."""
        self.err.print(text, style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Says what is going on while it is, on a terminal only."""
        if not self.err.is_terminal or self.err.quiet:
            yield
            return
        with self.err.status(what):
            yield

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[..., None] | bool]:
        """A progress function ``(done, total, more="")`` for ``fast_patch`` and others, or False where stderr is not a
        terminal; ``more`` stands behind ``what``."""
        if not self.err.is_terminal or self.err.quiet:
            yield False
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True) as progress:
            task = progress.add_task(what, total=total)

            def advance(done: int, total: int, more: str = "") -> None:
                progress.update(task, completed=done, total=total, description=f"{what}{more}")

            yield advance


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turns errors that are the caller's to mend into one line and exit code 2; ``debug`` adds the traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (PyarithError, OSError) as error:
        if debug:
            traceback.print_exc()
        one_line = " ".join(str(error).split())
        Terminal().err.print(f"pyarith: error: {one_line}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(ERROR) from None


def quiet_libraries() -> None:
    """No loading bars and no advice from Hugging Face libraries; what matters about a checkpoint is checked here."""
    import logging as standard

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    # transformers imports torchao where it is installed, which then reports each kernel that is not for this machine
    for name in ("torchao", "torch.utils._pytree"):
        standard.getLogger(name).setLevel(standard.ERROR)
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()


def percent(value: float, digits: int = 1) -> str:
    """A signed percentage, ``n/a`` for NaN."""
    return "n/a" if value != value else f"{100 * value:+.{digits}f}%"


def count(number: int, what: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def table() -> Any:
    """A plain rich table without a frame, narrow enough for four operators in 80 columns."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
