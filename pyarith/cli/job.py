"""A command that torchrun started as one of several ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from pyarith.cli.terminal import ERROR, Terminal
from pyarith.errors import PyarithError, RankError, check

if TYPE_CHECKING:
    from pyarith.engine.ranks import Team


@contextmanager
def job(terminal: Terminal, device: str) -> Iterator[tuple[Team, str]]:
    """The ranks of this job, and the device of this one; without a launcher, this process alone.

    Only rank 0 prints. An error that another rank has alone is told by that rank, too.

    Raises:
        RankError: a rank does not come, or there are more of them than GPUs.
    """
    from pyarith.engine.launch import joined, launched, own_device
    from pyarith.engine.ranks import team

    if not launched():
        with team() as alone:
            yield alone, device
        return
    device = own_device(device)
    with joined(device) as ranks:
        if ranks.rank:
            terminal.mute()
        try:
            yield ranks, device
        except (PyarithError, OSError) as error:
            ranks.failed(error)
            if ranks.first_says(error):
                raise typer.Exit(ERROR) from error
            if isinstance(error, RankError) or ranks.rank == 0:
                raise
            raise RankError(f"{ranks.name}: {error}") from error


def alone(command: str) -> None:
    """See that a command that one process runs was not started as several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from pyarith.engine.launch import launched

        check(
            not launched(),
            f"pyarith {command}: expected one process, got {os.environ['WORLD_SIZE']} ranks; of the commands only "
            "discover runs under torchrun",
        )
