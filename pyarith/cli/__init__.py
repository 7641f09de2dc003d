"""The command line. Commands import what they need when they run, so that ``pyarith --help`` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from pyarith.cli.command_analyze import analyze
from pyarith.cli.command_compare import compare
from pyarith.cli.command_demo import demo
from pyarith.cli.command_discover import discover
from pyarith.cli.command_doctor import doctor
from pyarith.cli.command_evaluate import evaluate
from pyarith.cli.command_knockout import knockout
from pyarith.cli.command_merge import merge
from pyarith.cli.command_profile import profile
from pyarith.cli.command_report import report
from pyarith.cli.command_reproduce import reproduce
from pyarith.cli.command_transfer import transfer
from pyarith.cli.command_tune import tune
from pyarith.cli.job import alone
from pyarith.cli.terminal import reported

app = typer.Typer(
    name="pyarith",
    help="Which attention heads and MLPs of a language model carry a behaviour: exact path patching of all of them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(discover)
app.command()(knockout)
app.command()(analyze)
app.command()(transfer)
app.command()(report)
app.command()(reproduce)
app.command()(tune)
app.command()(merge)
app.command()(compare)
app.command()(evaluate)
app.command()(profile)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from pyarith import __version__

        print(f"pyarith {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in (None, "discover"):
        with reported(debug=False):
            alone(context.invoked_subcommand)


def main() -> None:
    """Entry point of the command ``pyarith``."""
    app(prog_name="pyarith")
