"""What the commands on a finished run share: its model, and the words about a step that is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyarith.cli.terminal import Terminal, percent

if TYPE_CHECKING:
    from pyarith.reporting import RunDirectory, SavedRun, Step

_DEMO = "pyarith demo model"


def model_of(
    terminal: Terminal,
    run: SavedRun,
    *,
    model: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The run's model and tokenizer, in the run's dtype and revision.

    Args:
        model: where the model lies now, if not where the run found it.
        trust_remote_code: asked for again here: a run directory may come from anyone.
    Raises:
        InputError: it is not the model that the run was made with.
        Whatever ``load`` raises.
    """
    from pyarith.cli.loading import DTYPES, load
    from pyarith.cli.terminal import quiet_libraries

    said = run.record["model"]
    name = model or str(said["name"])
    with terminal.step(f"Loading {name}"):
        quiet_libraries()
        if name == _DEMO:
            from pyarith.demo import load_demo

            found, tokenizer = load_demo()
        else:
            dtype = str(said.get("dtype"))
            loaded = load(
                name,
                dtype=dtype if dtype in DTYPES else "auto",
                device=device,
                revision=None if model else said.get("revision"),
                trust_remote_code=trust_remote_code,
                note=terminal.note,
            )
            found, tokenizer = loaded.model, loaded.tokenizer
        run.same_model(found)
    return found, tokenizer


def done_already(terminal: Terminal, step: Step) -> None:
    """One line, and where the results lie."""
    terminal.line(f"Done already: {step.folder} holds this step with these settings; --force does it again")
    for name in step.record["hashes"]:
        terminal.line(f"  {step.folder / name}")


def went_on(terminal: Terminal, step: Step | RunDirectory, force: bool) -> None:
    """Says that parts of an interrupted run are there, or throws them away where all is to be done again."""
    if force:
        step.forget_parts()
    elif step.parts.is_dir():
        terminal.note("Going on with the parts that an interrupted run left")


def with_key_heads(terminal: Terminal, run: SavedRun, threshold: float) -> dict[str, list[Any]]:
    """Operator -> heads below the threshold, of the operators that have some; says which have none.

    Raises:
        InputError: none has.
    """
    import numpy as np

    from pyarith.errors import check

    found = {sign: run.key_heads(sign, threshold) for sign in run.signs}
    lowest = {sign: percent(float(np.nan_to_num(run.effects(sign), nan=0.0).min())) for sign in run.signs}
    text = ", ".join(f"{sign} {value}" for sign, value in lowest.items())
    check(
        any(found.values()),
        f"threshold: no head of this run lies below {100 * threshold:g}% (lowest effects: {text}), so there are no key "
        "heads; a higher --threshold takes weaker ones",
    )
    for sign, heads in found.items():
        if not heads:
            terminal.line(f"{sign}  left out: no head lies below {100 * threshold:g}% (lowest: {lowest[sign]})")
    return {sign: heads for sign, heads in found.items() if heads}
