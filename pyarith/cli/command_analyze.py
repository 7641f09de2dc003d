"""``pyarith analyze``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyarith.cli.options import Debug, Device, Force, ModelNow, RunDir, Threshold, TrustRemoteCode
from pyarith.cli.terminal import Terminal, reported, table

if TYPE_CHECKING:
    from pyarith.reporting.analyses import Analyses

_NAMES = {
    "attention": "attention of key heads",
    "mlp": "MLP cosines",
    "lens": "logit lens",
    "attribution": "direct logit attribution",
    "overlap": "overlap between operators",
}


def analyze(
    run_dir: RunDir,
    top: Annotated[int, typer.Option(metavar="N", help="At most so many key heads per operator.", min=1)] = 5,
    prompt: Annotated[
        int | None,
        typer.Option(metavar="ROW", help="Prompt of the lens, row of prompts.csv from 0. [first answered rightly]"),
    ] = None,
    threshold: Threshold = -0.05,
    model: ModelNow = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """What the key heads of a run look at, and what its MLPs write.

    Attention by token role, MLP cosines, logit lens, direct attribution, overlap between operators. What cannot be done
    with the model or its prompts is said in one line, the rest goes on.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.runs import done_already, model_of
        from pyarith.errors import InputError, check
        from pyarith.reporting import SavedRun, Step

        start = time.perf_counter()
        run = SavedRun.open(run_dir)
        most = min(run.effects(sign).size for sign in run.signs)
        check(top <= most, f"top: expected at most the {most} heads of the model, got {top}")
        if prompt is not None:
            rows = min(len(run.prompts[sign]) for sign in run.signs)
            check(0 <= prompt < rows, f"prompt: expected 0 to {rows - 1}, got {prompt}")
        step = Step(run, "analysis", {"top": top, "prompt": prompt, "threshold": threshold})
        if step.finished and not force:
            done_already(terminal, step)
            return
        loaded, tokenizer = model_of(terminal, run, model=model, device=device, trust_remote_code=trust_remote_code)
        from pyarith.reporting.analyses import Analyses, analyse, overlap_of, record, tables

        seconds = {"loading": time.perf_counter() - start}
        found = Analyses()
        for sign in run.signs:
            begun = time.perf_counter()
            with terminal.step(f"Analysing {sign}"):
                analyse(loaded, tokenizer, run, sign, run.key_heads(sign, threshold)[:top], found, prompt)
            seconds[f"analysis {sign}"] = time.perf_counter() - begun
        with terminal.step("Overlap between operators"):
            overlap_of(run, threshold, found)
        for (what, sign), why in found.reasons.items():
            terminal.line(f"{sign}  {_NAMES[what]}: not done: {why}".lstrip())
        if not found.ran:
            raise InputError("RUN_DIR: none of the analyses can be done with this run; the reasons are above")
        _show(terminal, found, tokenizer)
        from pyarith.reporting.tables import write_csv

        with step.alone():
            for name, made in tables(found, tokenizer).items():
                write_csv(step.file(name), made)
            _pictures(step, found, Path(str(run.record["model"]["name"])).name)
            files = step.finish(record(found), seconds)
        for file in files:
            terminal.line(f"Wrote {file}")
        terminal.line(f"Took {time.perf_counter() - start:.1f} s")


def _pictures(step: Any, found: Analyses, name: str) -> None:
    from pyarith.cli.arithmetic import name_of
    from pyarith.plots import attention_figure, cosines_figure

    if found.attention:
        masses = {name_of(sign): one for sign, one in found.attention.items()}
        step.add_figure("attention.png", attention_figure(masses, title=f"{name}: what key heads look at"))
    if found.cosines:
        cosines = {name_of(sign): one for sign, one in found.cosines.items()}
        step.add_figure("mlp.png", cosines_figure(cosines, title=f"{name}: operands and answer in the MLPs"))


def _show(terminal: Terminal, found: Analyses, tokenizer: Any) -> None:
    """Short tables of what ran."""
    if found.attention:
        _attention(terminal, found)
    if found.cosines:
        _cosines(terminal, found)
    if found.lens:
        _lens(terminal, found, tokenizer)
    if found.attribution:
        _attribution(terminal, found)
    if found.overlap is not None:
        _overlap(terminal, found.overlap)


def _print(terminal: Terminal, title: str, columns: list[str], rows: list[list[str]]) -> None:
    terminal.line(title, style="bold")
    from rich.markup import escape

    made = table()
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*map(escape, row))  # a token may look like markup
    terminal.out.print(made)
    terminal.line()


def _attention(terminal: Terminal, found: Analyses) -> None:
    roles = next(iter(found.attention.values())).roles
    rows = [
        [f"{sign} {head}", *(f"{100 * value:.0f}" for value in means)]
        for sign, one in found.attention.items()
        for head, means in zip(one.heads, one.mean, strict=True)
    ]
    names = [role.replace("operand_", "operand ") for role in roles]
    _print(terminal, "Attention of key heads at the last token, percent by token role", ["head", *names], rows)


def _cosines(terminal: Terminal, found: Analyses) -> None:
    means = {sign: one.mean for sign, one in found.cosines.items()}
    layers = len(next(iter(means.values()))["answer"])
    shown = [*range(layers)] if layers <= 12 else sorted({*range(0, layers, -(-layers // 10)), layers - 1})
    rows = [
        [str(layer), *(" ".join(f"{mean[c][layer]:+.2f}" for c in mean) for mean in means.values())] for layer in shown
    ]
    _print(
        terminal, "MLPs: cosine with operand A, operand B, and of the write with the answer", ["layer", *means], rows
    )
    for sign, one in found.cosines.items():
        at = "flat" if one.points is None else "start {}, inflection {}, end {}".format(*one.points)
        left = found.cosines_left_out[sign]
        terminal.line(f"{sign}  the answer's curve: {at}" + (f"; {left} prompts left out: long operands" * bool(left)))
    terminal.line()


def _lens(terminal: Terminal, found: Analyses, tokenizer: Any) -> None:
    sign, one = next(iter(found.lens.items()))
    prompt, answer = found.lens_prompts[sign]
    rows = []
    for layer in range(len(one.tokens)):
        cells = [str(layer)]
        for stage in range(2):
            top = zip(one.tokens[layer, stage, 0, :3], one.probabilities[layer, stage, 0, :3], strict=True)
            cells.append(" ".join(f"{tokenizer.decode([int(token)])!r} {p:.2f}" for token, p in top))
        rows.append(cells)
    title = f"Logit lens of {prompt!r} (answer {answer}): most likely tokens"
    _print(terminal, title, ["layer", "before the MLP", "after it"], rows)


def _attribution(terminal: Terminal, found: Analyses, most: int = 6) -> None:
    columns = []
    for one in found.attribution.values():
        largest = sorted(one.rows(), key=lambda row: -abs(row["logit"]))[:most]
        columns.append([f"{_part(row)} {row['logit']:+.2f}" for row in largest])
    rows = [[str(i + 1), *(column[i] for column in columns)] for i in range(min(map(len, columns)))]
    title = "Direct logit attribution (another quantity than path patching): largest parts, in logits"
    _print(terminal, title, ["#", *found.attribution], rows)


def _part(row: dict[str, Any]) -> str:
    """``head 2.7``, ``mlp 4``, ``embedding``."""
    if row["head"] >= 0:
        return f"head {row['layer']}.{row['head']}"
    return str(row["kind"]) if row["layer"] < 0 else f"{row['kind'].replace('_', ' ')} {row['layer']}"


def _overlap(terminal: Terminal, found: Any) -> None:
    rows = []
    for row in found.rows():
        interval = (
            "-"
            if row["spearman_low"] != row["spearman_low"]
            else (f"{row['spearman_low']:.2f} .. {row['spearman_high']:.2f}")
        )
        sizes = f"{int(row['common'])} of {len(found.key_heads[row['a']])} and {len(found.key_heads[row['b']])}"
        chance = f"{row['jaccard']:.2f} ({row['expected_jaccard']:.2f})"
        cells = [f"{row['a']} and {row['b']}", sizes, chance, f"{row['p']:.2g}", f"{row['spearman']:.2f}", interval]
        rows.append(cells)
    columns = ["operators", "key heads shared", "Jaccard (chance)", "p", "Spearman", "95% interval"]
    _print(terminal, "Overlap between operators", columns, rows)
