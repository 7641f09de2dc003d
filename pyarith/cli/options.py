"""Options that more than one command has."""

from __future__ import annotations

from typing import Annotated

import typer

N = Annotated[int, typer.Option("--n", "-n", metavar="N", help="Prompts per operator.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")]
Corruption = Annotated[str, typer.Option(metavar="KIND", help="operator, operand_a, operand_b or operands.")]
Top = Annotated[int, typer.Option(metavar="N", help="Heads to print.", min=1)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
