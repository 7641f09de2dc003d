"""Options that more than one command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

N = Annotated[int, typer.Option("--n", "-n", metavar="N", help="Prompts per operator.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")]
Corruption = Annotated[str, typer.Option(metavar="KIND", help="operator, operand_a, operand_b or operands.")]
Top = Annotated[int, typer.Option(metavar="N", help="Heads to print.", min=1)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Force = Annotated[bool, typer.Option("--force", help="Do again what is done already.")]
RunDir = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="What `pyarith discover ... --out RUN_DIR` wrote.", show_default=False)
]
Threshold = Annotated[
    float, typer.Option(metavar="EFFECT", help="Heads with a lower effect are key heads; -0.05 = 5 % lower.")
]
ModelNow = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Where the run's model lies now. [where it was]")
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run code that comes with the model.")
]
